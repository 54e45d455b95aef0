"""``python -m tdhook_rl.cli``."""

import sys

from tdhook_rl.cli.program import main

sys.exit(main())
