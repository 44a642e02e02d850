"""Certificates for the TLS tests, made anew each time. Each PEM file holds a certificate and its key."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

_DAY = timedelta(days=1)


def issue_all(folder: Path) -> None:
    """Write certificates into ``folder``: some of a CA, and some of another CA that nobody trusts."""
    # Import it here, because it takes a while and few tests need it.
    import trustme

    ours, other = trustme.CA(), trustme.CA(organization_name="nobody's")
    ours.cert_pem.write_to_path(str(folder / "ca.pem"))

    def issue(file: str, *names: str, ca: trustme.CA = ours, **dates: Any) -> None:
        issued = ca.issue_cert(*names, **dates)
        issued.private_key_and_cert_chain_pem.write_to_path(str(folder / f"{file}.pem"))

    now = datetime.now(timezone.utc)
    issue("server", "localhost", "127.0.0.1")
    issue("elsewhere", "other.example", "10.0.0.5")
    issue("expired", "127.0.0.1", not_before=now - 2 * _DAY, not_after=now - _DAY)
    issue("later", "127.0.0.1", not_before=now + _DAY, not_after=now + 2 * _DAY)
    issue("strange", "127.0.0.1", ca=other)
    issue("client", "actor@learner.example")
    issue("strange_client", "actor@learner.example", ca=other)
