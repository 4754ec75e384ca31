"""What a process of the zoo does when it is tested: what the name of the model says.

It imports no torch, so that such a process starts at once.
"""

import os
import signal
import time


def misbehave(name: str, step: str) -> dict[str, object]:
    """A row with the number of the process, if it comes so far."""
    if name == "hangs":
        time.sleep(600)
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "exits":
        os.write(2, b"the last words\n")
        os._exit(7)
    if name == "raises":
        raise RuntimeError("two\nlines")
    return {"process": os.getpid()}
