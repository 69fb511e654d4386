"""Contenders that take turns within one process."""

import random
import threading
import time
from functools import partial

import torch


class Turns:
    """Threads that run one at a time, round after round; measures the time of each epoch's batches.

    If something slows the machine down for a while, it slows all of them. Each round has another order, so that no
    contender always follows the same one.

    Args:
        epochs: Number of epochs. The first of them is a warm-up, and does not count.
        batches: Batches of an epoch.
        each: Batches of a turn, a divisor of ``batches``.
        settle: Waits until a device has finished the work of a turn.
        clock: Default: CPU time of this process, in which one contender at a time computes.
    """

    def __init__(self, epochs, batches, each=1, settle=lambda: None, clock=time.process_time):
        self.epochs = epochs
        self.each = each
        self.batches = batches // each
        self.settle = settle
        self.clock = clock
        self.seconds = {}
        self._calls = {}
        self._order, self._left, self._whose, self._started, self._failure = [], [], None, {}, None
        self._rng = random.Random(0)
        self._changed = threading.Condition()

    def add(self, name, contender):
        """Prepare a contender, up to its first batch. It must call its argument at the start of each batch."""
        ready = threading.Event()
        self.seconds[name] = []
        self._order.append(name)

        def run():
            torch.set_flush_denormal(True)  # for this thread: else small numbers slow a run down
            try:
                contender(partial(self._boundary, name, ready), self.epochs)
                self._boundary(name, ready, last=True)
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                ready.set()
                self._leave(name)

        threading.Thread(target=run, daemon=True).start()
        ready.wait()
        if self._failure is not None:
            raise self._failure

    def run(self):
        """Train all of them: {name: seconds of each epoch}. The end of an epoch counts to its last batch.

        Those of one epoch were measured in the same rounds: the epochs of two contenders are pairs.
        """
        with self._changed:
            self._pass_on()
            self._changed.wait_for(lambda: not self._order or self._failure is not None)
        if self._failure is not None:
            raise self._failure
        starts = range(self.batches, self.epochs * self.batches, self.batches)
        return {name: [sum(found[i : i + self.batches]) for i in starts] for name, found in self.seconds.items()}

    def _boundary(self, name, ready, last=False):
        calls = self._calls[name] = self._calls.get(name, -1) + 1
        if calls % self.each:
            return
        self.settle()
        now = self.clock()
        with self._changed:
            if name in self._started:
                self.seconds[name].append(now - self._started[name])
                if not last:
                    self._pass_on()
            ready.set()
            self._changed.wait_for(lambda: self._whose == name)
        self._started[name] = self.clock()

    def _pass_on(self):
        if not self._left:
            self._left = self._rng.sample(self._order, len(self._order))
        self._whose = self._left.pop() if self._left else None
        self._changed.notify_all()

    def _leave(self, name):
        with self._changed:
            self._order.remove(name)
            if self._whose == name:
                self._pass_on()
            self._changed.notify_all()
