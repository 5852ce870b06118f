"""Rows that more than one dashboard has: queue, batches and models of what serves."""

from __future__ import annotations

from k8s.dashboards.panels import PODS, Panel, Row, gauge, mean, per_second, quantile


def queue(labels: str = PODS) -> Row:
    """What waits, how long, and what is refused; ``labels`` choose the services."""
    return Row(
        "Queue",
        (
            Panel(
                "Tokens that wait",
                "Tokens in the queue of each service. Rises for long: add replicas.",
                "short",
                (("{{service}}", f"sum by (service) (kleash_queue_tokens{{{labels}}})"),),
            ),
            Panel(
                "Wait for the model, p95",
                "Seconds between the arrival of a call and its first forward pass.",
                "s",
                (("{{service}}", quantile(0.95, "kleash_queue_wait_seconds", "service", labels)),),
            ),
            Panel(
                "Refused calls by reason",
                "queue_full: add replicas. late, deadline: callers wait too briefly, or the queue "
                "is long. quota: the caller's own. too_large: the caller should split. auth: "
                "credentials.",
                "reqps",
                (
                    (
                        "{{service}} {{reason}}",
                        per_second("kleash_requests_rejected_total", "service, reason", labels),
                    ),
                ),
            ),
        ),
    )


def batches(labels: str = PODS) -> Row:
    """How full forward passes are, and how long they take; ``labels`` choose the services."""
    return Row(
        "Batches",
        (
            Panel(
                "Items in a forward pass, mean",
                "1 under load: callers send one item at a time and wait for the answer.",
                "short",
                (("{{service}}", mean("kleash_batch_items", "service", labels)),),
            ),
            Panel(
                "Padding, mean share",
                "Share of a forward pass that is padding. Above a half: lower "
                "limits.max_batch_tokens.",
                "percentunit",
                (("{{service}}", mean("kleash_batch_padding_ratio", "service", labels)),),
            ),
            Panel(
                "Forward pass, p95",
                "Seconds of one forward pass; of the policy, one token of all its responses.",
                "s",
                (("{{service}}", quantile(0.95, "kleash_compute_seconds", "service", labels)),),
            ),
        ),
    )


def models(labels: str = PODS, *, span: int = 16) -> Panel:
    """What is served; ``labels`` choose the models."""
    columns = ("pod", "service", "name", "revision", "dtype", "tokenizer_sha256")
    headings = ("Pod", "Service", "Model", "Revision", "Type", "Tokenizer")
    return Panel(
        "Models that are served",
        "Name, revision, number type and tokenizer of each model. Two revisions of one model: a "
        "roll-out, or one that did not end.",
        "none",
        (("", f"max by ({', '.join(columns)}) (kleash_model_info{{{labels}}})"),),
        kind="table",
        span=span,
        columns=tuple(zip(columns, headings, strict=True)),
    )


def gpu_memory(runs: str = "") -> Panel:
    """Of the processes that run a service, or of all."""
    return Panel(
        "Memory of GPUs",
        "allocated: tensors. reserved: held by PyTorch, with what is free inside. total: of the "
        "card. reserved near total: lower the limits of batches or slots.",
        "bytes",
        (
            (
                "{{pod}} {{kind}}",
                f"sum by (pod, kind) ({gauge('kleash_gpu_memory_bytes', runs=runs)})",
            ),
        ),
    )
