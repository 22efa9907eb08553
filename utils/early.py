"""What a script does before it imports torch, which takes seconds: from then on it ends when it is told to.

Only for a script that is run: `if __name__ == "__main__": end_when_told()` above its other imports.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent is gone


def end_when_told() -> None:
    """Ctrl-C ends the script silently until `script.run` takes over, and so does torchrun's end. Not on Windows."""
    if os.name == "nt":
        sys.exit("Windows lacks what locks and processes need here: use WSL2 (or Linux, or macOS)")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_torchrun()


def end_with_torchrun() -> None:
    """When the torchrun that started this process is gone, however it ended, the kernel sends a SIGTERM (Linux only).

    Else the process would go on as an orphan where torchrun is killed, or gets a signal that it does not pass on.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended between these lines
            os.kill(os.getpid(), signal.SIGTERM)
