"""`python -m coinfer.cli`, the same as `coinfer`."""

import sys

from .app import main

sys.exit(main())
