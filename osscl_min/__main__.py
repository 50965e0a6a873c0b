"""``python -m osscl_min``, and the command ``osscl``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly, while it starts too."""
    try:
        from osscl_min.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
