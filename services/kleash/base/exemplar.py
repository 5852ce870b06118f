"""Exemplars of histograms: the trace in which a value was observed.

For the second argument of ``Histogram.observe``; a page in the format of OpenMetrics shows them.
"""

from __future__ import annotations

from kleash.base import tracing
from kleash.base.tracing import Span


def current_exemplar() -> dict[str, str] | None:
    """The trace of the current span; None where that is not recorded."""
    trace_id = tracing.current_trace_id()
    return None if trace_id is None else {"trace_id": trace_id}


def exemplar_of(span: Span | None) -> dict[str, str] | None:
    """The trace of ``span``, which may be another thread's; None for none."""
    if span is None:
        return None
    with tracing.use(span):
        return current_exemplar()
