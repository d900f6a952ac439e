"""Processes that share the work of one command."""

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """Initializer of a worker: signals are the parent's to handle, and a parent that was killed takes it along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
