"""The process that computes for a viewer: started once, kept warm, fed with jobs.

The viewer's side is :class:`Worker`; :func:`serve` is the child's. Jobs and orders go to the child, and messages come
back, as small pickles over its standard input and output; volumes lie in memory that both sides map. The child is a
fresh interpreter started with ``-c`` rather than one of ``multiprocessing``, because that imports the parent's
``__main__`` again: a script that opens a viewer would open another one.

Shared memory is a file of the system's memory file system (/dev/shm), mapped by both sides. Its name is removed as
soon as both have mapped it, so nothing can be left behind, whoever is killed, and it is freed when the last array
that shows it is gone. ``multiprocessing.shared_memory`` ties the memory to an object beside the array instead, and dies
of SIGBUS where /dev/shm is too small (64 MB in a container): room is claimed here before it is used, and the
folder for temporary files stands in.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import deque
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import Job, OperatorJob, ReconstructionJob, TrainJob, quiet_threads
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Message, VolumeReady
from napari_recon.jobs.stages import Control
from napari_recon.jobs.volumes import remove_partial
from napari_recon.learning.training import checkpoint_path

_NICE = 5
"""How much the child gives way to the viewer."""

_PATIENCE = 2.0
"""Seconds that the child has to end by itself when the viewer closes."""

_IDLE = 1.0
"""Seconds without a job after which the child gives memory back, which takes a while."""

_LAST_STEP = 0.5
"""Seconds of these that a job which may be writing has to stop."""


class Worker:
    """The viewer's side of the worker process.

    No method waits for the child: orders are written to a pipe by a thread, and another reads what comes back.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: deque[bytes] = deque()
        self._order_given = threading.Condition()
        self._messages: deque[tuple[int, Message]] = deque()
        self._volumes: dict[str, NDArray[np.float32]] = {}
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._job: Job | None = None
        self._number = 0
        self._running = False
        self._ready = threading.Event()
        self._closed = False

    # -- what it is doing ------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the child has imported and compiled what it needs; jobs may be submitted before."""
        return self._ready.is_set()

    @property
    def running(self) -> bool:
        """Whether a job was submitted whose last message has not come back."""
        return self._running

    @property
    def pid(self) -> int | None:
        """The child's process id, or None while there is no child."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def volume(self, name: str) -> NDArray[np.float32]:
        """The array of a volume of the last job, "fdk" or "result" say; it changes while the job runs.

        The array stays valid whatever happens to the child.

        Raises
        ------
        KeyError
            Before the job's ``VolumeReady`` of that name.
        """
        return self._volumes[name]

    def poll(self) -> list[Message]:
        """What came back of the last job since the last call; never waits."""
        found = []
        while self._messages:
            number, message = self._messages.popleft()
            if number == self._number:
                found.append(message)
        return found

    # -- orders ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the child if there is none; it warms up by itself. Does nothing once the worker is closed."""
        with self._starting:
            if self._closed or self.pid is not None:
                return
            # The child imports from where the parent does, and nothing of the parent's __main__.
            command = f"import sys; sys.path[:] = {sys.path!r}; from napari_recon.jobs.worker import serve; serve()"
            flags: dict[str, Any] = {}
            if sys.platform == "win32":
                flags["creationflags"] = subprocess.CREATE_NO_WINDOW
            else:  # Ctrl-C in the terminal is for the viewer
                flags["process_group"] = 0
            process = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=quiet_threads(dict(os.environ)),
                **flags,
            )
            orders: deque[bytes] = deque()
            with self._lock:
                self._ready.clear()
                self._process, self._orders = process, orders
            atexit.register(self.close)
            threading.Thread(target=self._write, args=(process, orders), name="orders", daemon=True).start()
            threading.Thread(target=self._read, args=(process, orders), name="messages", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Run a job; one that still runs is cancelled first, and nothing more is heard of it."""
        if self._closed:
            raise RuntimeError("The worker was closed: make another.")
        self.start()
        with self._lock:
            self._number += 1
            self._job, self._running = job, True
            self._volumes = {}
        self._order("submit", self._number, job)

    def pause(self) -> None:
        """Wait after the step that runs now."""
        self._order("pause")

    def resume(self) -> None:
        """Go on after a pause."""
        self._order("resume")

    def finish(self) -> None:
        """Stop after the step that runs now and keep what there is."""
        self._order("finish")

    def cancel(self) -> None:
        """Stop after the step that runs now, and free and write nothing."""
        self._order("cancel")

    def focus(self, point: tuple[float, float, float] | None) -> None:
        """Work nearest to ``point`` first: (z, y, x) in voxels."""
        self._order("focus", point)

    def change(self, settings: dict[str, Any]) -> None:
        """Go on with other parameters from the next step on; see :meth:`Control.change`."""
        self._order("change", settings)

    def close(self, patience: float = _PATIENCE) -> None:
        """End the child: by itself within ``patience`` seconds, else it is killed. May be called again."""
        self._closed = True
        atexit.unregister(self.close)
        with self._starting:
            process, self._process = self._process, None
        if process is None:
            return
        with self._order_given:
            self._orders.append(b"")  # closes the pipe, which the child takes as the end
            self._order_given.notify()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._clean_up(process.pid)

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, *order: Any) -> None:
        if self.pid is None:
            return
        with self._order_given:
            self._orders.append(_pack(order))
            self._order_given.notify()

    # -- threads ---------------------------------------------------------------------------------------------------

    def _write(self, process: subprocess.Popen[bytes], orders: deque[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError), process.stdin:  # OSError: the child is gone
            while process.poll() is None:
                with self._order_given:
                    while not orders:
                        self._order_given.wait()
                    order = orders.popleft()
                if not order:
                    return
                process.stdin.write(order)
                process.stdin.flush()

    def _read(self, process: subprocess.Popen[bytes], orders: deque[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            while (found := _unpack(stream)) is not None:
                number, message = found
                if message == "ready":
                    self._ready.set()
                    continue
                array = None
                if isinstance(message, VolumeReady) and message.handle:
                    # Mapped here and now, whether or not it is still asked for: this takes the name off the system.
                    array = _map_shared(message.handle, message.shape)
                with self._lock:
                    if number != self._number:
                        continue
                    if array is not None:
                        self._volumes[message.name] = array
                    if isinstance(message, Finished | Cancelled | Failed):
                        self._running = False
                    self._messages.append((number, message))
        status = process.wait()
        with self._order_given:  # lets its own writing thread go; ``self._orders`` may be its successor's already
            orders.append(b"")
            self._order_given.notify_all()
        if self._closed:
            return
        self._clean_up(process.pid)
        with self._lock:
            if self._process is not process:  # its successor is at work already
                return
            self._ready.clear()
            if self._running:
                self._running = False
                self._messages.append((self._number, Failed("killed", _obituary(status, self._job))))

    def _clean_up(self, pid: int) -> None:
        """Remove what a child that was killed while writing left behind."""
        if self._job is not None:
            _remove_half_written(self._job, pid)
        remove_shared(pid)


def _obituary(status: int, job: Job | None) -> str:
    if status >= 0:
        how = f"ended unexpectedly (exit status {status})"
    elif -status == getattr(signal, "SIGKILL", None):
        how = "was killed (signal 9; the system does so when memory runs out)"
    else:
        how = f"crashed (signal {-status}, {signal.Signals(-status).name})"
    if isinstance(job, TrainJob):
        return (
            f"The computing process {how}: train on fewer or smaller volumes, or smaller patches; the best weights and "
            "the last checkpoint are kept."
        )
    return (
        f"The computing process {how}: choose a smaller patch or more binning and run again; the volume so far is kept."
    )


# -- the child -----------------------------------------------------------------------------------------------------


def serve() -> None:
    """The child's life: warm up, then run job after job until standard input ends."""
    import faulthandler

    orders, messages = _take_standard_streams()
    faulthandler.enable()
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICE)  # every thread made from now on gives way to the viewer
    with contextlib.suppress(OSError):
        # Of the two, the system had better kill this process than the viewer when memory runs out.
        Path("/proc/self/oom_score_adj").write_text("500")
    desk = _Desk(orders)
    threading.Thread(target=desk.listen, name="orders", daemon=True).start()

    from napari_recon.jobs.memory import release_memory
    from napari_recon.jobs.run import run_job
    from napari_recon.jobs.stages import Prepared

    _warm_up()
    prepared = Prepared()
    with contextlib.suppress(BrokenPipeError):  # the viewer is gone
        _send(messages, 0, "ready")
        while True:
            if not desk.wait_for_job(_IDLE):
                release_memory()
            number, job, control = desk.next_job()
            for message in run_job(job, control, prepared):
                _send(messages, number, message)
            control.volumes.clear()
            del control
            desk.job_done()
    desk.leave()


class _Desk:
    """Where orders arrive, in a thread of their own, so that they are heard while a job computes."""

    def __init__(self, orders: IO[bytes]) -> None:
        self._orders = orders
        self._changed = threading.Condition()
        self._next: tuple[int, Job, Control] | None = None
        self._current: tuple[int, Job, Control] | None = None

    def wait_for_job(self, seconds: float) -> bool:
        """Whether a job arrives within some seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._next is not None, seconds)

    def next_job(self) -> tuple[int, Job, Control]:
        """Wait for a job."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None)
            assert self._next is not None
            self._current, self._next = self._next, None
            return self._current

    def job_done(self) -> None:
        """The job that was taken last has said its last word."""
        with self._changed:
            self._current = None
            self._changed.notify_all()

    def listen(self) -> None:
        """Pass orders on until the viewer closes the pipe or dies, and then leave."""
        while (order := _unpack(self._orders)) is not None:
            name, *values = order
            with self._changed:
                if name == "submit":
                    for job in (self._current, self._next):
                        if job is not None:
                            job[2].cancel()
                    self._next = (values[0], values[1], Control(allocate=_allocate_shared))
                    self._changed.notify_all()
                    continue
                last = self._next or self._current
            if last is not None:
                getattr(last[2], name)(*values)
        with self._changed:
            if self._current is not None and _may_write(self._current[1]):  # let it stop
                _, current, control = self._current
                (control.finish if isinstance(current, TrainJob) else control.cancel)()
                self._changed.wait_for(lambda: self._current is None, _LAST_STEP)
        self.leave()

    def leave(self) -> NoReturn:
        """End this process, whatever its threads do, and leave nothing behind."""
        _allocating.acquire()  # for good: from here on no thread makes another file
        remove_shared(os.getpid())
        if self._current is not None:
            _remove_half_written(self._current[1])
        os._exit(0)


def _may_write(job: Job) -> bool:
    """Whether a job writes a file; that of an operator does so in the cache, at least."""
    return isinstance(job, OperatorJob | TrainJob) or (isinstance(job, ReconstructionJob) and job.output is not None)


def _remove_half_written(job: Job, process: int | None = None) -> None:
    """Remove what ``process`` (this one, by default) left behind of a job's output when it ended amid writing."""
    if not isinstance(job, ReconstructionJob | OperatorJob | TrainJob) or job.output is None:
        return
    if isinstance(job, TrainJob):  # the temporary names of weights and checkpoint
        for file in (job.output, checkpoint_path(job.output)):
            file.with_name(file.name + ".partial").unlink(missing_ok=True)
    elif isinstance(job, OperatorJob):  # NormalOperator.save's temporary name
        job.output.with_name(job.output.name + ".partial").unlink(missing_ok=True)
    else:
        remove_partial(job.output, process)


def _take_standard_streams() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes to the viewer; whoever prints from now on prints to standard error."""
    orders = os.fdopen(os.dup(0), "rb")
    messages = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return orders, messages


def _warm_up() -> None:
    """Import and compile what every job needs. What fails here will be said by the job that needs it."""
    with contextlib.suppress(Exception):
        import torch

        from napari_recon.physics import projectors

        projectors.warm_up()
        from napari_recon.reconstruction.tv import TVPrior

        TVPrior(2, nonnegative=True).prox(torch.rand(1, 1, 8, 8, 8), gamma=0.1)


# -- the pipe ------------------------------------------------------------------------------------------------------


def _pack(value: Any) -> bytes:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return struct.pack("<I", len(data)) + data


def _send(stream: IO[bytes], number: int, message: Message | str) -> None:
    stream.write(_pack((number, message)))
    stream.flush()


def _unpack(stream: IO[bytes]) -> Any:
    """The next value, or None at the stream's end."""
    try:
        head = stream.read(4)
        if len(head) < 4:
            return None
        size = struct.unpack("<I", head)[0]
        data = stream.read(size)
    except (OSError, ValueError):  # closed under the reader's hands
        return None
    return pickle.loads(data) if len(data) == size else None


# -- shared memory -------------------------------------------------------------------------------------------------

_allocating = threading.Lock()


def _allocate_shared(name: str, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], str]:
    """A volume of zeros that another process can map, and the handle that it does so by."""
    size = 4 * int(np.prod(shape))
    if sys.platform == "win32":
        handle = f"napari-recon-{os.getpid()}-{uuid.uuid4().hex}"
        return _as_volume(mmap.mmap(-1, size, tagname=handle), shape), handle
    for folder in _folders():
        with _allocating, contextlib.suppress(OSError):
            return _allocate_file(folder, size, shape)
    raise MemoryError(f"No room for volume {name!r} of {size} bytes in {' or '.join(map(str, _folders()))}.")


def _allocate_file(folder: Path, size: int, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], str]:
    file, path = tempfile.mkstemp(prefix=f"napari-recon-{os.getpid()}-", dir=folder)
    try:
        # Claim the room: without, the process would die of SIGBUS where there is too little.
        (os.posix_fallocate if hasattr(os, "posix_fallocate") else _lengthen)(file, 0, size)
        return _as_volume(mmap.mmap(file, size), shape), path
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(file)


def _map_shared(handle: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Map what :func:`_allocate_shared` made in another process, and take its name off the system."""
    size = 4 * int(np.prod(shape))
    if sys.platform == "win32":
        return _as_volume(mmap.mmap(-1, size, tagname=handle), shape)
    with open(handle, "r+b") as file:
        os.unlink(handle)
        return _as_volume(mmap.mmap(file.fileno(), size), shape)


def remove_shared(pid: int) -> None:
    """Remove what process ``pid`` made and nobody mapped."""
    if sys.platform != "win32":
        for folder in _folders():
            for path in folder.glob(f"napari-recon-{pid}-*"):
                path.unlink(missing_ok=True)


def _folders() -> list[Path]:
    return [folder for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())) if folder.is_dir()]


def _lengthen(file: int, _: int, size: int) -> None:
    os.ftruncate(file, size)


def _as_volume(memory: mmap.mmap, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.frombuffer(memory, np.float32).reshape(shape)  # the array keeps the mapping alive
