"""The process that targets' processes are forked from: ``python -m attnproof.worker.main FD``.

It has torch loaded and has never seen a target, nor any input or answer. Forking it gives a
target a fresh process in milliseconds, where starting Python and torch anew takes seconds, so
that a crash is cheap. It serves one parent over the socket FD: start a process, end a
process; when the parent is gone it ends them all.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import socket
import sys
import time
import traceback
import warnings

from attnproof.worker.protocol import Channel, Closed

POLL_SECONDS = 0.01


def main(descriptor: int) -> None:
    """Serve the parent until it closes the socket."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    # A core of a process with torch in it is large, and nobody asked for one.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        # Elsewhere forking a process that has loaded numerical libraries is not safe.
        import attnproof.worker.serving  # noqa: F401
    gc.freeze()
    control = socket.socket(fileno=descriptor)
    channel = Channel(control, takes_files=True)
    channel.send({"ready": True})
    running: set[int] = set()
    try:
        while True:
            request = channel.receive()
            if "end" in request:
                pid = request["end"]
                running.remove(pid)
                channel.send(_end(pid, request["grace"]))
            else:
                connection, log = channel.take_descriptor(), channel.take_descriptor()
                with warnings.catch_warnings():
                    # Of threads: those of numpy's BLAS, which sees to it that it can be forked.
                    warnings.simplefilter("ignore")
                    pid = os.fork()
                if not pid:
                    control.close()
                    _become_target(connection, log)
                running.add(pid)
                os.close(connection)
                os.close(log)
                channel.send({"pid": pid})
    except Closed:
        for pid in running:
            _end(pid, 0.0)


def _become_target(connection: int, log: int) -> None:
    """Never returns: this is the forked process."""
    status = 1
    try:
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        from attnproof.worker.serving import serve

        serve(socket.socket(fileno=connection))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: threads and exit handlers of the target must not hold this up.
        os._exit(status)


def _end(pid: int, grace: float) -> dict[str, int | bool]:
    """End the process and its group; whether it had ended by itself, and its exit status.

    It is not reaped before its group is killed, so that the number cannot be another's.
    """
    deadline = time.monotonic() + grace
    while not (ended := _has_ended(pid)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    _, status = os.waitpid(pid, 0)
    return {"by_itself": ended, "exit_code": os.waitstatus_to_exitcode(status)}


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    main(int(sys.argv[1]))
