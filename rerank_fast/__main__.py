import sys

from rerank_fast.cli import main

sys.exit(main())
