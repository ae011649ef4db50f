"""From a bell to a settled task, in stages that do not wait for each other.

  main thread      hears the bell, claims, moderates, tokenises   while the GPU ends the one before
  rewriting        threads for prompts that are rewritten first    beside the drawing
  drawing          one thread: the GPU has always work             bounded: one batch ahead
  finishing        threads: pixels, file, upload, settlement       bounded: FINISHING_MAX images

A stage that is full holds up the one before it, back to the claim: a slow image store slows the
intake and fills no memory. Each failure is its own task's. No transaction is open while the GPU
draws or the network uploads; what this process leaves unfinished is found by the repairs when its
lease runs out.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import structlog
from PIL.Image import Image

from storage import events, queue, tasks
from storage.database import transaction
from storage.errors import ResourceExhausted, RewriteFailed
from storage.models import Task
from worker import clock, ending
from worker.clock import ClockWrong
from worker.drawing import SIDE_STEP_PX, Drawing, Picture, Pipeline, Rewriter
from worker.ending import Job
from worker.leases import ClaimLost, HandBack, Leases
from worker.settings import settings
from worker.watch import Watch

LOOK_AHEAD_STEPS = 2
"""The next task is claimed when the one at hand has so many steps left: early enough for the GPU
not to wait, and late enough to leave the task to a worker that is free before."""
FINISHING_MAX = 8
"""Drawn images in memory at a time; more than the largest batch would have to wait for itself."""
FINISHERS = 4
LAST_WORDS_S = 10
"""How long a process whose GPU hangs takes to hand back what it holds."""
EXIT_HUNG = 70
DRAWING = "drawing"
"""What is watched beside single jobs."""
DOWNSCALED_AREA_PX = 512 * 512
RATE_WINDOW_S = 60

logger = structlog.get_logger()


class Moderation(Protocol):
    def check_prompt(self, prompt: str, *, strict: bool) -> None:
        """Raises: ContentRefused."""
        ...

    def check_image(self, image: Image, *, strict: bool) -> None:
        """Raises: ContentRefused."""
        ...


class Worker:
    """This process: its name, its pipeline, and the stages around it.

    Its threads run from the first claim until `close`.
    """

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        *,
        moderation: Moderation,
        rewriter: Rewriter | None = None,
        rewrites_max: int = 1,
        on_hang: Callable[[], None] = lambda: os._exit(EXIT_HUNG),
    ) -> None:
        self.name = name
        self.pipeline = pipeline
        self._moderation = moderation
        self._rewriter = rewriter
        self._rewrites_max = rewrites_max
        self._on_hang = on_hang

        self._changed = threading.Condition()
        self._ready: deque[list[Job]] = deque()
        self._in_hand: set[Job] = set()
        self._drawing: list[Job] = []
        self._rewriting: set[Job] = set()
        self._next_is_wanted = True
        self._stopping = False
        self._closing = False
        self._rests_until = 0.0
        self._images: deque[float] = deque()
        self._images_total = 0

        self._leases = Leases()
        self._watch = Watch(settings.step_timeout_s, self._hung)
        self._rewriters = ThreadPoolExecutor(rewrites_max, "rewriting")
        self._finishers = ThreadPoolExecutor(FINISHERS, "finishing")
        self._finishing = threading.BoundedSemaphore(FINISHING_MAX)
        self._drawer = threading.Thread(target=self._draw_until_closed, name="drawing")
        self._drawer.start()

    # --- Claiming: the main thread --------------------------------------------------------------

    def wait_until_wanted(self, timeout_s: float) -> bool:
        """Wait until the GPU will soon have nothing to do; False: not within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._next_is_wanted and not self._ready and not self._clock_is_wrong(),
                timeout_s,
            )

    def take(self) -> bool:
        """Claim the task whose turn it is, with those that are drawn along, and prepare them.

        False: nothing waits. Raises: ServiceUnavailable.
        """
        try:
            claimed = self._claim()
        except ClockWrong as wrong:
            logger.critical("worker.clock_wrong", error=str(wrong))
            self._rests_until = time.monotonic() + clock.LOOK_AGAIN_S
            queue.ring(1)  # for a worker whose clock is right
            return False
        jobs = [Job(task, self._leases.hold(task)) for task in claimed]
        with self._changed:
            self._in_hand.update(jobs)
        try:
            self._prepare(jobs)
        except BaseException:  # the second signal, or RQ's time limit
            for job in jobs:
                if job in self._in_hand:
                    with self._ending(job):
                        raise HandBack from None
            raise
        return bool(jobs)

    def _prepare(self, jobs: list[Job]) -> None:
        for job in jobs:
            with job.bound():
                logger.info("task.claimed", attempt=job.task.attempt, together=len(jobs))
                events.publish(job.task)
        if len(jobs) == 1 and tasks.must_be_rewritten(jobs[0].task):
            with self._changed:
                self._rewriting.add(jobs[0])
            self._rewriters.submit(self._rewrite, jobs[0])
            return
        self._enqueue([job for job in jobs if self._prepared(job)])

    def _claim(self) -> list[Task]:
        """Raises: ClockWrong, and nothing is claimed."""
        with transaction() as session:
            rewriting = len(self._rewriting) < self._rewrites_max
            first = tasks.claim_next(session, self.name, rewriting=rewriting)
            if first is None:
                return []
            if first.started_at is not None:
                clock.check(first.started_at)
            most = self.pipeline.batch_max(first.width, first.height, first.steps)
            if most == 1 or tasks.must_be_rewritten(first):
                return [first]
            return [first, *tasks.claim_alike(session, self.name, first, most - 1)]

    def _prepared(self, job: Job) -> bool:
        """Whether `job` can be drawn; if not, it has been ended."""
        try:
            self._moderation.check_prompt(job.prompt, strict=job.task.strict_moderation)
            job.reading = self.pipeline.read(job.prompt)
        except Exception as error:
            with self._ending(job):
                raise error
            return False
        return True

    def _enqueue(self, batch: list[Job]) -> None:
        if batch:
            with self._changed:
                self._ready.append(batch)
                self._changed.notify_all()

    # --- Rewriting ------------------------------------------------------------------------------

    def _rewrite(self, job: Job) -> None:
        try:
            if not self._rewritten(job) or not self._prepared(job):
                return
            self._enqueue([job])
        finally:
            with self._changed:
                self._rewriting.discard(job)
            # A task that was passed over meanwhile has lost its bell to nobody.
            queue.ring(1)

    def _rewritten(self, job: Job) -> bool:
        """Whether `job` has its new prompt; if not, it has been ended."""
        task = job.task
        try:
            self._moderation.check_prompt(task.prompt, strict=task.strict_moderation)
            if self._rewriter is None:
                raise RewriteFailed
            check = partial(self._check_rewriting, job)
            rewrite = self._rewriter(task.prompt, seed=task.seed, check=check)
            with transaction() as session:
                if not tasks.note_rewrite(session, job.held.claim, rewrite):
                    raise ClaimLost
        except Exception as error:
            with self._ending(job):
                raise error
            return False
        finally:
            self._watch.rest(job)
        job.prompt = rewrite.text
        return True

    def _check_rewriting(self, job: Job) -> None:
        self._watch.step(job)
        job.held.check()

    # --- Drawing: one thread --------------------------------------------------------------------

    def _draw_until_closed(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._draw(batch)
            self._watch.rest(DRAWING)

    def _next_batch(self) -> list[Job] | None:
        with self._changed:
            self._drawing = []
            self._next_is_wanted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._closing)
            if not self._ready:
                return None
            self._drawing = self._ready.popleft()
            self._next_is_wanted = False
            return self._drawing

    def _draw(self, claimed: Sequence[Job]) -> None:
        batch = [job for job in claimed if self._begun(job)]
        if not batch:
            return
        again: list[Job] = []
        for job, result in zip(batch, self._drawn(batch), strict=True):
            if isinstance(result, ResourceExhausted) and _shrunk(job):
                again.append(job)
            else:
                self._hand_over(job, result)
        for job in again:
            with job.bound():
                logger.warning("task.downscaled", width=job.width, height=job.height)
            (result,) = self._drawn([job])
            self._hand_over(job, result)

    def _begun(self, job: Job) -> bool:
        """Whether `job` is still wanted, now that its turn has come."""
        try:
            job.held.begin()
        except Exception as error:
            self._hand_over(job, error)
            return False
        return True

    def _drawn(self, batch: Sequence[Job]) -> Sequence[Picture | BaseException]:
        drawings = [
            Drawing(
                reading=job.reading,
                width=job.width,
                height=job.height,
                seed=job.task.seed,
                steps=job.task.steps,
                on_step=partial(self._step, job),
            )
            for job in batch
        ]
        self._watch.step(DRAWING)
        try:
            return self.pipeline.draw(drawings)
        except BaseException as error:  # a bug: each of them is told no more than that
            return [error] * len(batch)

    def _step(self, job: Job, done: int) -> None:
        self._watch.step(DRAWING)
        if not self._next_is_wanted and job.task.steps - done <= LOOK_AHEAD_STEPS:
            with self._changed:
                self._next_is_wanted = True
                self._changed.notify_all()
        job.held.step(done, job.task.steps)

    def _hand_over(self, job: Job, result: Picture | BaseException) -> None:
        """Give a drawn image to the finishers, once there is room for it."""
        self._watch.rest(DRAWING)  # waiting for room is not hanging
        self._finishing.acquire()
        self._finishers.submit(self._finish, job, result)

    # --- Finishing ------------------------------------------------------------------------------

    def _finish(self, job: Job, result: Picture | BaseException) -> None:
        try:
            with self._ending(job):
                if isinstance(result, BaseException):
                    raise result
                self._watch.step(job)
                image = result()  # it may still be drawn
                self._watch.rest(job)
                self._moderation.check_image(image, strict=job.task.strict_moderation)
                if ending.complete(job, image) is not None:
                    self._count_image()
        finally:
            self._finishing.release()

    @contextmanager
    def _ending(self, job: Job) -> Iterator[None]:
        """The last that is done with `job`: whatever goes wrong in it is the task's end."""
        with job.bound():
            try:
                try:
                    yield
                except BaseException as error:
                    ending.badly(job, error)
            except Exception:
                # The lease runs out, and the repairs finish the work.
                logger.exception("task.not_ended")
            finally:
                self._watch.rest(job)
                self._leases.release(job.held)
                with self._changed:
                    self._in_hand.discard(job)
                    self._changed.notify_all()

    # --- Stopping, and what others may know -----------------------------------------------------

    def drain(self) -> None:
        """Wait until everything that was claimed has ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_hand)

    def stop(self) -> None:
        """Let go of what is being rewritten: that may take long, and another worker can do it."""
        with self._changed:
            self._stopping = True
            for job in self._rewriting:
                job.held.handed_back = True

    def hand_back(self) -> None:
        """Let go of everything within a step, so that other workers draw it."""
        with self._changed:
            for job in self._in_hand:
                job.held.handed_back = True

    def close(self) -> None:
        """End the threads, after everything that was claimed has ended."""
        self.drain()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._drawer.join()
        self._watch.close()
        self._rewriters.shutdown()
        self._finishers.shutdown()
        self._leases.close()

    def facts(self) -> dict[str, object]:
        """What operators see of this worker at the moment."""
        with self._changed:
            while self._images and self._images[0] < time.monotonic() - RATE_WINDOW_S:
                self._images.popleft()
            return {
                "state": self._state(),
                "claimed": len(self._in_hand),
                "images_total": self._images_total,
                "images_per_minute": len(self._images),
            }

    def _clock_is_wrong(self) -> bool:
        return time.monotonic() < self._rests_until

    def _state(self) -> str:
        if self._stopping:
            return "stopping"
        if self._clock_is_wrong():
            return "clock_wrong"
        return "drawing" if self._drawing else "idle"

    def _count_image(self) -> None:
        with self._changed:
            self._images.append(time.monotonic())
            self._images_total += 1

    def _hung(self, what: set[Hashable]) -> None:
        """Hand back what is held, and end this process."""
        logger.critical("worker.gpu_hangs", timeout_s=settings.step_timeout_s)
        last_words = threading.Thread(target=self._let_go_of_all, args=(what,), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_S)
        self._on_hang()

    def _let_go_of_all(self, hung: set[Hashable]) -> None:
        with self._changed:
            guilty = {job for job in self._in_hand if job in hung}
            if DRAWING in hung:
                guilty.update(self._drawing)
            others = self._in_hand - guilty
        for job in guilty:
            # Whatever hangs a GPU must not hang one after the other for ever.
            ending.lose(job)
        for job in others:
            ending.hand_back(job)


def _shrunk(job: Job) -> bool:
    """Make `job` about 512 x 512 at its aspect ratio, if it may be and is not yet."""
    width, height = job.task.width, job.task.height
    scale = (DOWNSCALED_AREA_PX / (width * height)) ** 0.5
    if not job.task.allow_downscale or scale >= 1:
        return False
    job.width, job.height = (
        max(SIDE_STEP_PX, round(side * scale / SIDE_STEP_PX) * SIDE_STEP_PX)
        for side in (width, height)
    )
    return True
