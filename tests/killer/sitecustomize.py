"""Kills the process, or its whole group, the moment before it opens or renames a certain file for
the n-th time: on every machine at the same point of the program, in it or in a loader's worker.
Or sends it another signal.

Each Python process with this folder on its path watches for the moment that KILL_AT names, as in
"open train 3 group" or "open train 3 group SIGTERM": event, part of the file's name, count, the
victim, and the signal.
"""

import os
import signal
import sys

event, part, count, victim, *number = os.environ["KILL_AT"].split()
number = signal.Signals[number[0]] if number else signal.SIGKILL
left = int(count)


def watch(name, args):
    global left
    if name == event and any(part in a for a in args if isinstance(a, str)):
        left -= 1
        if not left:
            os.kill(os.getpid() if victim == "process" else 0, number)


sys.addaudithook(watch)
