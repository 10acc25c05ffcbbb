"""What a decoding process may do wrong; the functions are sent to one."""

import os
import signal
import time


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def abort(path):
    os.abort()


def hang(path):
    time.sleep(600)


def grow(path):
    return len(bytearray(8 * 1024**3))


def stumble(path):
    raise ZeroDivisionError("by\nzero")


def leave(path):
    raise SystemExit(3)


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def throw(path):
    raise Unpicklable("one", "two")


def fine(path):
    return path.upper()


def fill(size):
    return bytes(size)


def once(file, end, *args):
    """Ends the process the first time: by ``os.kill`` with a signal, or ``os._exit`` with a status."""
    if os.path.exists(file):
        return "the second time"
    open(file, "w").close()
    end(*([os.getpid()] if end is os.kill else []), *args)


def nap(seconds):
    time.sleep(seconds)
    return os.getpid()
