"""`python -m tinycea`, and the command `tinycea`: Ctrl-C ends in one line, from the first import on."""
import signal
import sys


def interrupt(number, frame):
    """Raise KeyboardInterrupt; amid an import try again 10 ms later: there libraries make other errors of it, or crash."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if not frame:
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def main(argv=None):
    """Run the command line, see `cli.main` -> exit status; 130 for Ctrl-C."""
    if hasattr(signal, "SIGALRM"):            # not on Windows
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.signal(signal.SIGINT, interrupt)
    try:
        from . import cli
        return cli.main(argv)
    except KeyboardInterrupt as stop:
        print(f"tinycea: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
