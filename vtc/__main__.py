"""``python -m vtc`` is the ``vtc`` command."""

from vtc.cli import main

if __name__ == "__main__":
    main()
