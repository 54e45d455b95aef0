"""``python -m tdhook_rl.cli``."""

import sys

from tdhook_rl.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
