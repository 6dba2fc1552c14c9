"""What a registry's WWW-Authenticate says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.storage.backend.registry.challenge import Challenge, parse_challenges


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ("", []),
        ("Basic", [("basic", {})]),
        ('bearer REALM="http://a/b?c=d",service="e"', [("bearer", {"realm": "http://a/b?c=d", "service": "e"})]),
        ('Bearer realm="a,b=\\"c\\"", scope=""', [("bearer", {"realm": 'a,b="c"', "scope": ""})]),
        (
            'Basic realm=x, Bearer realm="y" , service = z',
            [("basic", {"realm": "x"}), ("bearer", {"realm": "y", "service": "z"})],
        ),
        ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Negotiate abc==, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Bearer realm=http://a/t", [("bearer", {"realm": "http://a/t"})]),
        (", ,Basic realm=x,,", [("basic", {"realm": "x"})]),
        ('Bearer realm="unterminated', [("bearer", {})]),
        ("\u00e9", []),
    ],
)
def test_challenges(header: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert [(one.scheme, one.params) for one in parse_challenges(header)] == challenges


@given(st.text(alphabet='aA=", \\\t;:/é\x00Bearer', max_size=300))
def test_any_header_is_survived(header: str) -> None:
    for challenge in parse_challenges(header):
        assert isinstance(challenge, Challenge)
