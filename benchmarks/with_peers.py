"""Run a benchmark in a separate virtual environment that contains the peers.

    python benchmarks/with_peers.py compare.py --rounds 5

Requires only Python. The first run creates the environment and installs the packages.
"""

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".peers"


def main() -> int:
    if not sys.argv[1:] or not (HERE / sys.argv[1]).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    if not ENVIRONMENT.is_dir():
        venv.create(ENVIRONMENT, with_pip=True)
    python = str(ENVIRONMENT / "bin" / "python")
    requirements = str(HERE / "requirements.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    script, *arguments = sys.argv[1:]
    return subprocess.run([python, str(HERE / script), *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
