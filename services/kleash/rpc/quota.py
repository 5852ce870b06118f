"""What each caller may take of a server, and who goes first where calls wait.

    names of callers ─► first entry of server.quotas ─► Account, one per name ─► the call's context
                                                        running calls, tokens     batcher: priority,
                                                                                  queue, tokens

With authentication the proven name counts. Without, it is the one that the client claims: the first
word of its user agent, "kleash-trainer" for the bundled clients of a trainer. That is a courtesy
among friends and keeps nobody out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Self

import pydantic

from kleash.base.config import Config
from kleash.rpc.errors import Overloaded

QUOTA = "QUOTA"
BURST_S = 10.0
# When a running call ends is not known.
RUNNING_RETRY_S = 1.0
# Names without running calls and debts are forgotten when there are more.
MAX_IDLE_ACCOUNTS = 1000
MAX_CLAIM = 64


class QuotaConfig(Config):
    """What each of some callers may take."""

    callers: tuple[str, ...] = pydantic.Field(min_length=1)
    """Names, * and ? for any letters. The first entry with a caller's name counts for it; a caller
    without one has no limits and no precedence."""
    priority_s: float = pydantic.Field(default=0.0, ge=0, le=3600)
    """Seconds that a call of theirs is taken to have waited already: those that have waited longest
    go first, so that nobody waits for ever."""
    queue_share: float = pydantic.Field(default=1.0, gt=0, le=4)
    """Share of limits.max_queued_tokens up to which the queue takes their calls. Above 1 it keeps
    room that nobody else can fill; below 1 they leave room for others."""
    max_tokens_per_s: float = pydantic.Field(default=0.0, ge=0)
    """Tokens of each caller per second, in the long run; 0 for any number."""
    burst_tokens: int = pydantic.Field(default=0, ge=0)
    """Tokens at once after a rest; 0 means those of ten seconds."""
    max_running_calls: int = pydantic.Field(default=0, ge=0)
    """Calls of each caller at a time, waiting ones included; 0 for any number."""

    @pydantic.model_validator(mode="after")
    def _check_burst(self) -> Self:
        if self.burst_tokens and not self.max_tokens_per_s:
            raise ValueError("burst_tokens has no effect without max_tokens_per_s")
        return self


DEFAULT_QUOTAS = (QuotaConfig(callers=("*trainer*",), priority_s=60.0, queue_share=1.25),)
"""A training run goes before the rest, which it would otherwise wait for at every step."""
_NO_LIMITS = QuotaConfig(callers=("*",))


class Account:
    """What one caller has taken. Used on the event loop alone."""

    def __init__(self, name: str, config: QuotaConfig) -> None:
        self.name = name
        self.priority_s = config.priority_s
        self.queue_share = config.queue_share
        self.num_running = 0
        self._config = config
        self._rate = config.max_tokens_per_s
        self._burst = config.burst_tokens or max(BURST_S * self._rate, 1.0)
        self._balance = self._burst
        self._as_of = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing is owed: forgetting it gives the caller nothing."""
        return not self.num_running and self._tokens_left() >= self._burst

    def begin(self) -> None:
        """Count a call that begins. Raises Overloaded, before the request costs anything."""
        limit = self._config.max_running_calls
        if limit and self.num_running >= limit:
            raise Overloaded(
                f"{self._who} has {self.num_running} calls under way, and {limit} at a time are "
                "allowed; wait for one to end.",
                reason=QUOTA,
                retry_after_s=RUNNING_RETRY_S,
            )
        if self._rate and (left := self._tokens_left()) <= 0:
            raise self._over(f"{self._who} has used up its tokens", 1.0 - left)
        self.num_running += 1

    def end(self) -> None:
        """A call that began has ended."""
        self.num_running -= 1

    def take(self, tokens: int) -> None:
        """Take ``tokens``, or raise Overloaded. More than a burst at once waits for a full one."""
        if not self._rate:
            return
        missing = min(tokens, self._burst) - self._tokens_left()
        if missing > 0:
            raise self._over(f"the request of {self._who} has {tokens} tokens", missing)
        self._balance -= tokens

    @property
    def _who(self) -> str:
        return f"'{self.name}'" if self.name else "a caller without a name"

    def _tokens_left(self) -> float:
        now = time.monotonic()
        self._balance = min(self._balance + self._rate * (now - self._as_of), self._burst)
        self._as_of = now
        return self._balance

    def _over(self, what: str, missing: float) -> Overloaded:
        wait_s = missing / self._rate
        return Overloaded(
            f"{what}, and {self._rate:g} a second are allowed; try again in {wait_s:.1f} s.",
            reason=QUOTA,
            retry_after_s=wait_s,
        )


_account: ContextVar[Account | None] = ContextVar("kleash_account", default=None)


def account() -> Account | None:
    """Of the caller of the call being handled; None outside of a call."""
    return _account.get()


class Quotas:
    """Accounts by name."""

    def __init__(self, config: Sequence[QuotaConfig], *, trusts_claims: bool) -> None:
        """``trusts_claims``: callers have no proven names, so that the claimed ones count."""
        self._config = config
        self._trusts_claims = trusts_claims
        self._accounts: dict[str, Account] = {}

    def begin(self, caller: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Let a call of ``caller`` begin; ``end`` must follow. Raises Overloaded, then not."""
        name = claimed_name(metadata) if self._trusts_claims else caller
        its = self._accounts.get(name) or self._open(name)
        its.begin()
        _account.set(its)

    def end(self) -> None:
        """The call being handled ends, if it began."""
        its = _account.get()
        if its is not None:
            its.end()
            _account.set(None)

    def _open(self, name: str) -> Account:
        if len(self._accounts) >= MAX_IDLE_ACCOUNTS:
            self._accounts = {each: a for each, a in self._accounts.items() if not a.is_idle}
        its = self._accounts[name] = Account(name, self._entry(name))
        return its

    def _entry(self, name: str) -> QuotaConfig:
        for entry in self._config:
            if any(fnmatchcase(name, pattern) for pattern in entry.callers):
                return entry
        return _NO_LIMITS


def claimed_name(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The first product of the user agent, without its version; "" without one."""
    for key, value in metadata:
        if key == "user-agent" and isinstance(value, str):
            return value.split(" ", 1)[0].split("/", 1)[0][:MAX_CLAIM]
    return ""
