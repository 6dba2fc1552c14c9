"""Signatures of S3: the examples that AWS publishes, and AWS's own library for everything else."""

from __future__ import annotations

import calendar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.storage.backend.keys import Keys
from nydusd.storage.backend.sigv4 import quote_path, sign
from tests.support import botocore_client

# Amazon S3 API reference, "Authenticating Requests: Using the Authorization Header", example GET Object.
EXAMPLE_KEYS = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
EXAMPLE_TIME = calendar.timegm((2013, 5, 24, 0, 0, 0))

printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
words = st.text("ABCdef019/+=._-", min_size=1, max_size=40)


def test_the_published_example() -> None:
    url = "https://examplebucket.s3.amazonaws.com/test.txt"
    signed = sign(EXAMPLE_KEYS, "us-east-1", "GET", url, {"Range": "bytes=0-9"}, EXAMPLE_TIME, ("range",))
    assert signed == {
        "X-Amz-Date": "20130524T000000Z",
        "X-Amz-Content-Sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "Authorization": (
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
            "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
            "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        ),
    }


@given(
    method=st.sampled_from(["GET", "HEAD"]),
    scheme=st.sampled_from(["http", "https"]),
    host=st.sampled_from(["s3.amazonaws.com", "127.0.0.1:9000", "bucket.s3.eu-west-1.amazonaws.com", "[::1]:8080"]),
    key=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40),
    region=st.sampled_from(["us-east-1", "cn-north-1", "x"]),
    keys=st.builds(Keys, words, words, st.one_of(st.just(""), words)),
    first=st.integers(0, 1 << 50),
    with_range=st.booleans(),
    payer=st.one_of(st.none(), printable, st.just("a  b   c")),
    now=st.integers(0, 4102444800),
)
def test_any_request_is_signed_as_botocore_signs_it(
    method: str,
    scheme: str,
    host: str,
    key: str,
    region: str,
    keys: Keys,
    first: int,
    with_range: bool,
    payer: str | None,
    now: int,
) -> None:
    url = f"{scheme}://{host}/bucket/{quote_path(key)}"
    headers = {} if payer is None else {"x-amz-request-payer": payer}
    if with_range:
        headers["Range"] = f"bytes={first}-{first + 9}"
    extra = ("range",) if with_range else ()
    # What is not to be signed must not change the signature.
    ours = sign(
        keys, region, method, url, {**headers, "User-Agent": "nydusd", "Accept-Encoding": "identity"}, now, extra
    )
    theirs = botocore_client.signed_headers(
        method, url, headers, region, keys.key_id, keys.secret, keys.session_token, now
    )
    assert {name.lower(): value for name, value in ours.items()}.items() <= theirs.items()
    assert ("X-Amz-Security-Token" in ours) == bool(keys.session_token)


def test_the_range_is_not_signed_unless_wanted() -> None:
    """A peer-to-peer proxy on the way asks for ranges of its own with our signature."""
    signatures = {
        sign(EXAMPLE_KEYS, "x", "GET", "http://host/b/k", {"Range": f"bytes={first}-9"}, 0)["Authorization"]
        for first in range(3)
    }
    assert len(signatures) == 1


def test_keys_do_not_show_in_messages() -> None:
    assert repr(EXAMPLE_KEYS) == "Keys()"


@pytest.mark.parametrize(
    ("key", "quoted"), [("a/b.c_d-e~f", "a/b.c_d-e~f"), ("a b+c%20", "a%20b%2Bc%2520"), ("é", "%C3%A9")]
)
def test_paths_are_percent_encoded_once(key: str, quoted: str) -> None:
    assert quote_path(key) == quoted
