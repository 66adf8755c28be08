"""``embferry keys ca`` and ``embferry keys cert``: certificates for TLS between the parts of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embferry.cli.options import fail, need
from embferry.protocol.errors import LocalProtocolError

CA_DAYS, DAYS = 3650, 365


def ca(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Gets ca.pem and ca.key; made if it is absent.")],
    days: Annotated[int, typer.Option(help="Days until it expires.", metavar="DAYS")] = CA_DAYS,
) -> None:
    """Make the cluster's own CA. It signs the certificates of the parts.

    Copy ca.pem to every part. Keep ca.key off them: who has it can join the cluster.
    """
    need("tls", "cryptography")
    from embferry.trust.certificates import make_ca

    try:
        cert, key = make_ca(directory, days=days)
    except LocalProtocolError as error:
        fail(error.detail, status=1)
    typer.echo(f"{cert}: the certificate, for every part (EMBFERRY_TLS_CA)")
    typer.echo(f"{key}: its key, for making certificates only")


def cert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the part; its files are NAME.pem and NAME.key.")],
    ca: Annotated[Path, typer.Option(help="The folder of the CA. The files are written there.", metavar="DIR")],
    host: Annotated[
        list[str],
        typer.Option(help="Name or IP address by which others reach the part. May be repeated.", metavar="HOST"),
    ],
    days: Annotated[int, typer.Option(help="Days until it expires.", metavar="DAYS")] = DAYS,
) -> None:
    """Make a certificate for a part of the cluster, signed by its CA.

    To renew one, make another under a new name and move its files over the old ones, the key first: parts read them
    again without a restart.
    """
    need("tls", "cryptography")
    from embferry.trust.certificates import make_certificate

    try:
        made, key = make_certificate(name, host, ca, days=days)
    except LocalProtocolError as error:
        fail(error.detail, status=1)
    typer.echo(f"{made}: the certificate (EMBFERRY_TLS_CERT)")
    typer.echo(f"{key}: its key, for the part alone (EMBFERRY_TLS_KEY)")
