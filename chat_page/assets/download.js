watch("value", () => {
  if (!props.value) return;
  const { name, text } = props.value;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href));
});
