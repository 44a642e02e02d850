"""For PyTorch-Ignite: a handler that sends what an engine processes.

    SinkHandler(sink).attach(trainer)
    trainer.run(loader, max_epochs=10)

Attach it before other handlers: those of the same event are called in that order, so that a ``Checkpoint`` attached
after it is written when everything sent is acked.
"""

from __future__ import annotations

from typing import Any, Literal

from echo_torch.callbacks import loop, require_extra
from echo_torch.sink import EchoSink

with require_extra(__name__, "ignite"):
    from ignite.engine import Engine, Events


class SinkHandler(loop.SinkCallback):
    """Connects when a run starts, sends after each iteration, and waits for acks when an epoch or the run ends.

    It waits likewise when the engine is terminated or interrupted, and delivers for up to 5 seconds when an error ends
    the run (and closes then, with ``close``). The error comes out of ``run`` as it would without this handler: unless
    others are attached to ``EXCEPTION_RAISED``, which then have to raise it.

    For checkpoints amid an epoch attach `on_checkpoint` to their event, before them. A ``Checkpoint`` may have this
    handler in ``to_save``, for a resumed run to go on counting. One handler may serve a trainer and its evaluators, but
    with ``close`` a single engine. In a distributed job every rank sends its own shard; a distributed sampler pads it,
    so that a sample may be sent twice. Attached on all ranks, give it `ranks.cpu_group` as ``group``.

    Args:
        sink: stays the caller's.
        send: what is sent: the ``"batch"`` or the ``"output"`` of ``engine.state``; an output of None is not.
        policy: further arguments of `loop.SinkCallback`. ``select``, if given, makes what is sent of both.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range. Attached, ``run`` raises what the
            methods of `loop.SinkCallback` do.
    """

    def __init__(self, sink: EchoSink, *, send: Literal["batch", "output"] = "batch", **policy: Any) -> None:
        if send not in ("batch", "output"):
            raise ValueError(f"send: got {send!r}, expected 'batch' or 'output'")
        if send == "output" and policy.get("select") is None:
            policy["select"] = _select_output
        super().__init__(sink, **policy)

    def attach(self, engine: Engine) -> None:
        """Have ``engine`` call this handler; once for each engine."""
        # A run goes on after an error that another handler swallows: after `setup`, so do the methods of this one.
        for event in (Events.STARTED, Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED):
            engine.add_event_handler(event, self.setup)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.on_epoch_end)
        engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, self._epoch_terminated)
        engine.add_event_handler(Events.INTERRUPT, self.on_checkpoint)
        engine.add_event_handler(Events.TERMINATE, self._terminated)
        engine.add_event_handler(Events.COMPLETED, self.on_train_end)

        def reraise_alone(error: BaseException) -> None:  # without the engine, which may be collected while it is told
            if not isinstance(error, GeneratorExit):  # of an interrupted run that nobody resumes
                self.on_exception(error)
            if (
                engine._event_handlers[Events.EXCEPTION_RAISED][-1][0] is reraise_alone
            ):  # there are none but such as this
                raise error

        engine.add_event_handler(Events.EXCEPTION_RAISED, reraise_alone)
        handlers = engine._event_handlers[Events.EXCEPTION_RAISED]
        handlers.insert(0, handlers.pop())  # for none is called after one that raises

    def _iteration_completed(self, engine: Engine) -> None:
        self.on_batch_end(engine.state.batch, engine.state.output)

    def _epoch_terminated(self, iter_counter: int) -> None:
        self.on_epoch_end()

    def _terminated(self, engine: Engine) -> None:
        if engine.should_terminate == "skip_completed":
            self.on_train_end()
        else:
            self.on_epoch_end()


def _select_output(batch: Any, output: Any) -> Any:
    return output
