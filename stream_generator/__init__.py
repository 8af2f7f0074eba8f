"""Token-by-token generation: ids in, ids and text out. Import from the modules themselves."""
