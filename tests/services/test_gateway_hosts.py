"""By which names the HTTP port may be called where it wants no authentication."""

from __future__ import annotations

import pytest
from tests.services.http_client import serving_http
from tests.services.test_gateway_refusals import CALL, HttpDoubler

pytestmark = pytest.mark.services


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_a_page_that_points_its_name_at_this_machine_is_refused(host: str) -> None:
    with serving_http(HttpDoubler()) as (_, port):
        reply = port.post("/double", CALL, {"Host": host})
        assert reply.status == 403
        assert reply.error["reason"] == "OTHER_HOST"
        assert "server.http_allowed_hosts" in reply.error["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8080", "a.localhost", "127.1.2.3"]
)
def test_names_of_this_machine_are_answered(host: str) -> None:
    with serving_http(HttpDoubler()) as (_, port):
        reply = port.post("/double", CALL, {"Host": host})
        assert reply.status == 200


def test_names_of_a_proxy_are_answered_when_they_are_allowed() -> None:
    with serving_http(HttpDoubler(), http_allowed_hosts=("reward.example",)) as (_, port):
        assert port.post("/double", CALL, {"Host": "reward.example"}).status == 200
        assert port.post("/double", CALL, {"Host": "evil.example"}).status == 403
