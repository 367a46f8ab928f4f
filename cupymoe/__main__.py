"""``python -m cupymoe`` is the command ``cupymoe``."""

from cupymoe.tools.cli import main

if __name__ == "__main__":
    main(prog_name="cupymoe")
