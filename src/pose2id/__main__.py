"""`python -m pose2id`."""

import sys

from pose2id.cli import main

sys.exit(main())
