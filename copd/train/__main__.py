"""`python -m copd.train` is `copd train`."""

import sys

from copd.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
