"""TLS certificates: each site's own root, and the short-lived leaves that it issues alone (protocol.md §3).

A leaf names its holder in one URI, `wardround://CONSORTIUM/ROLE/ID`; the aggregator's also carries the DNS
name that clients ask for. All ECDSA P-256.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.errors import Reason, ServiceError
from services.common.ids import Role, check_id

_URI = re.compile(r"wardround://([^/]+)/([^/]+)/([^/]+)")
_ROOT_DAYS = 3650
_REMEMBERED = 1024  # leaves whose names and issuer were read: every call shows one, and neither ever changes
_SKEW = timedelta(minutes=5)  # sites' clocks differ: a leaf is valid from a little before it was made


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Identity:
    """Whom a leaf names."""

    consortium: str
    role: Role
    id: str


def server_name(id: str, consortium: str) -> str:
    """The TLS name of the aggregator `id`: from the charter, whatever its address is."""
    return f"{id}.{consortium}.wardround.internal"


def make_root(consortium: str, id: str, now_ms: int, days: float = _ROOT_DAYS) -> Issued:
    """A new root for the site `id`, valid from `now_ms`. Its key stays at the site, off the cluster."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, check_id(consortium, "consortium")),
            x509.NameAttribute(NameOID.COMMON_NAME, check_id(id)),
        ]
    )
    builder = _builder(name, name, key.public_key(), now_ms, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(root=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return _signed(builder, key, key)


def issue_leaf(
    root: bytes,
    root_key: bytes,
    role: Role,
    id: str,
    consortium: str,
    *,
    days: float,
    now_ms: int,
    server_names: Sequence[str] = (),
) -> Issued:
    """A new leaf and key, valid for `days` from `now_ms`; `server_names` only for a role that listens (aggregator)."""
    issuer = x509.load_pem_x509_certificate(root)
    issuer_key = serialization.load_pem_private_key(root_key, None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey) or issuer_key.public_key() != issuer.public_key():
        raise ServiceError(Reason.INVALID_DOCUMENT, "the root's key is not that of its certificate: give the pair")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{role.value} {check_id(id)}"[:64])])
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server_names else [])]
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"wardround://{consortium}/{role.value}/{id}")]
    names += [x509.DNSName(server) for server in server_names]
    builder = _builder(name, issuer.subject, key.public_key(), now_ms, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(root=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
    )
    return _signed(builder, key, issuer_key)


@lru_cache(maxsize=_REMEMBERED)
def load_leaf(pem: bytes) -> tuple[x509.Certificate, Identity]:
    """A leaf and whom it names. Raises ValueError for what is no PEM, NOT_PERMITTED as `identity_of`."""
    leaf = x509.load_pem_x509_certificate(pem)
    return leaf, identity_of(leaf)


def identity_of(leaf: x509.Certificate) -> Identity:
    """Whom the leaf names: exactly one URI of our form; anything else raises NOT_PERMITTED."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise _unnamed("has no subject alternative name") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    match = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if match is None or match[2] not in list(Role):
        raise _unnamed("does not name exactly one wardround://CONSORTIUM/ROLE/ID")
    try:
        return Identity(check_id(match[1]), Role(match[2]), check_id(match[3]))
    except ServiceError:
        raise _unnamed("names a site that is no DNS label") from None


def check_leaf(leaf: x509.Certificate, roots: Sequence[bytes], now_ms: int) -> None:
    """Raise NOT_PERMITTED unless one of `roots` (PEM) itself issued `leaf` and it is valid at `now_ms`."""
    if not any(_issued_by(leaf, root) for root in roots):
        raise ServiceError(
            Reason.NOT_PERMITTED,
            "the certificate was not issued by this member's own root in the charter: issue it with `wardround site`",
        )
    begin, end = _validity(leaf)
    if not begin <= now_ms / 1000 <= end:
        now = datetime.fromtimestamp(now_ms / 1000, UTC)
        raise ServiceError(
            Reason.NOT_PERMITTED,
            f"the certificate is valid from {leaf.not_valid_before_utc:%Y-%m-%dT%H:%MZ} to "
            f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%MZ}, and it is {now:%Y-%m-%dT%H:%MZ}: renew it, or set the clock",
        )


@lru_cache(maxsize=_REMEMBERED)
def _validity(leaf: x509.Certificate) -> tuple[float, float]:
    """(not before, not after) in Unix seconds."""
    return leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()


@lru_cache(maxsize=_REMEMBERED)
def _issued_by(leaf: x509.Certificate, root: bytes) -> bool:
    try:
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(root))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _unnamed(fault: str) -> ServiceError:
    return ServiceError(Reason.NOT_PERMITTED, f"the certificate {fault}: issue it with `wardround site`")


def _usage(root: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not root,
        key_cert_sign=root,
        crl_sign=root,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now_ms: int, days: float
) -> x509.CertificateBuilder:
    now = datetime.fromtimestamp(now_ms // 1000, UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _SKEW).not_valid_after(now + timedelta(days=days))


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
) -> Issued:
    certificate = builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Issued(certificate, private)
