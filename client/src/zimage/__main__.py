"""`python -m zimage` is the command `zimage`."""

import sys

from zimage.command import main

sys.exit(main())
