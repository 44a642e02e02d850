"""A handler for PyTorch-Ignite that sends what an engine processes: ``SinkHandler(sink).attach(trainer)``.

Attach it before other handlers. Ignite calls the handlers of an event in the order they were attached, so a
``Checkpoint`` attached later is written only after everything sent is acked.
"""

from __future__ import annotations

from typing import Any, Literal

from echo_torch.callbacks import loop, require_extra
from echo_torch.sink import EchoSink

with require_extra(__name__, "ignite"):
    from ignite.engine import Engine, Events


class SinkHandler(loop.SinkCallback):
    """Connects when a run starts, sends after each iteration, and waits for acks when an epoch or the run ends.

    It also waits when the engine is terminated or interrupted. If an error ends the run, it delivers for up to 5
    seconds and, with ``close``, closes the sink. ``run`` raises the error as it would without this handler. But if you
    attach other handlers to ``EXCEPTION_RAISED``, they have to raise it.
    To write checkpoints in the middle of an epoch, attach `on_checkpoint` to their event before you attach them. Put
    this handler into ``to_save`` of a ``Checkpoint`` if a resumed run should continue the counts.

    One handler may serve a trainer and its evaluators, but only a single engine if ``close`` is set. In a distributed
    job, every rank sends its own shard. A distributed sampler pads that shard, so a sample may be sent twice. If you
    attach the handler on all ranks, pass `ranks.cpu_group` as ``group``.

    Args:
        sink: the sink to send through. You keep it.
        send: which part of ``engine.state`` to send, ``"batch"`` or ``"output"``. An output of None is skipped.
        policy: further arguments of `loop.SinkCallback`. ``select``, if given, makes the batch to send from both.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range. Once attached, ``run`` raises what the
            methods of `loop.SinkCallback` raise.
    """

    def __init__(self, sink: EchoSink, *, send: Literal["batch", "output"] = "batch", **policy: Any) -> None:
        if send not in ("batch", "output"):
            raise ValueError(f"send: got {send!r}, expected 'batch' or 'output'")
        if send == "output" and policy.get("select") is None:
            policy["select"] = _select_output
        super().__init__(sink, **policy)

    def attach(self, engine: Engine) -> None:
        """Attach this handler to ``engine``. Call this once per engine."""
        # A run continues after an error that another handler swallows. `setup` runs first on each of these events, so
        # the methods attached below work again.
        for event in (Events.STARTED, Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED):
            engine.add_event_handler(event, self.setup)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.on_epoch_end)
        engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, self._epoch_terminated)
        engine.add_event_handler(Events.INTERRUPT, self.on_checkpoint)
        engine.add_event_handler(Events.TERMINATE, self._terminated)
        engine.add_event_handler(Events.COMPLETED, self.on_train_end)

        # The signature leaves out the engine, because Ignite may have collected it by the time it calls this.
        def reraise_alone(error: BaseException) -> None:
            if not isinstance(error, GeneratorExit):  # which only means that nobody resumes an interrupted run
                self.on_exception(error)
            # Raise only if no foreign handler is attached. Handlers like this one go to the front of the list, so one
            # of them is last only if there are no others.
            if engine._event_handlers[Events.EXCEPTION_RAISED][-1][0] is reraise_alone:
                raise error

        engine.add_event_handler(Events.EXCEPTION_RAISED, reraise_alone)
        # Go first, because Ignite calls no further handler once one raises.
        handlers = engine._event_handlers[Events.EXCEPTION_RAISED]
        handlers.insert(0, handlers.pop())

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
