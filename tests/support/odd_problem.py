"""A tiny problem whose code misbehaves on purpose, in one of many ways and at one of many places."""

PROBLEM = """
import ctypes, os, signal, subprocess, sys, threading, time
from dataclasses import dataclass
import torch
from torch import nn
from stiefel.compare import Data, Problem, where

def unprintable():
    class Odd(Exception):
        def __str__(self):
            raise ValueError("no message")
    raise Odd

def deep(n=0):
    return deep(n + 1) + 1

def fail(error):
    raise error

def much(told=[]):
    if not told:
        told += [print("x" * 1_000_000) for _ in range(100)]

def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "300"])
        os._exit(0)

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)

def close():
    os.close(1)
    os.close(2)

FAULTS = {
    "none": lambda: None,
    "exit0": lambda: os._exit(0),
    "exit74": lambda: os._exit(74),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "hang": lambda: time.sleep(600),
    "deaf": deaf,
    "sysexit0": lambda: sys.exit(0),
    "sysexit74": lambda: sys.exit(74),
    "print": much,
    "long": lambda: fail(ValueError("y" * 20_000_000)),
    "surrogate": lambda: fail(ValueError("\\ud800 \\x1b[31m \\0")),
    "print surrogate": lambda: print("\\ud800"),
    "oserror": lambda: open("/nowhere/font.ttf"),
    "fork": os.fork,
    "popen": lambda: subprocess.Popen(["sleep", "300"]),
    "daemon": daemon,
    "interrupt": lambda: fail(KeyboardInterrupt()),
    "deep": deep,
    "unprintable": unprintable,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill group": lambda: os.killpg(0, signal.SIGKILL),
    "kill parent": lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(600)),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "thread": lambda: threading.Thread(target=time.sleep, args=(600,)).start(),
    "close": close,
}

@dataclass(frozen=True, kw_only=True)
class Odd(Problem):
    fault: str = "none"
    place: str = where("loss")
    epochs: int = 2
    batch_size: int = 32

    def act(self, place):
        if "stiefel.compare.problem.check" in sys.modules:  # the trial of the problem, before any run
            place = "trial " + place
        if place == self.place:
            FAULTS[self.fault]()

    def make_model(self):
        self.act("make_model")
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))

    def make_data(self):
        self.act("make_data")
        x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] > 0).long()
        return Data((x[:64], y[:64]), (x[64:80], y[64:80]), (x[80:], y[80:]))

    def loss(self, model, batch):
        time.sleep(0.03)
        self.act("loss")
        return super().loss(model, batch)

    def train_step(self, model, optimizer, batch):
        loss = super().train_step(model, optimizer, batch)
        self.act("train_step")
        return loss

    def evaluate(self, model, batch):
        self.act("evaluate")
        return super().evaluate(model, batch)

    def keep(self, model, folder):
        self.act("keep")
"""

PLACES = ("make_model", "make_data", "loss", "train_step", "evaluate", "keep")
OUTCOMES = {
    "exit0": "crashed", "exit74": "crashed", "segfault": "crashed", "abort": "crashed", "hang": "timeout",
    "deaf": "timeout", "sysexit0": "error", "sysexit74": "error", "print": "done", "long": "error",
    "surrogate": "error", "print surrogate": "done", "oserror": "error", "fork": "done", "popen": "done",
    "daemon": "done", "interrupt": "error", "deep": "error", "unprintable": "error", "kill": "killed",
    "kill group": "killed", "kill parent": "killed", "terminate": "killed", "thread": "done", "close": "done",
}  # fmt: skip
"""The status of a run whose code misbehaves so."""
HARMLESS = tuple(fault for fault, status in OUTCOMES.items() if status == "done")
"""Those that a trial passes too."""
