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


def fine(path):
    return path.upper()
