"""The certificate of a gateway that speaks HTTPS itself, without a proxy.

Knows PEM files and their renewal. Knows nothing about connections or requests.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import NoReturn

from llama.errors import BadSettings

logger = logging.getLogger(__name__)

_MARKS = {"certificate": b"-----BEGIN CERTIFICATE-----", "key": b"PRIVATE KEY-----"}


class _EncryptedKey(Exception):
    """The key has a passphrase, for which OpenSSL would ask on the terminal."""


class Certificate:
    """A certificate chain, its private key, and the TLS context that uses both."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises BadSettings if one of the files cannot be used."""
        self._certificate, self._key = certificate, key
        self._stamps = self._read_stamps()
        self.context = self._new_context()

    def reload_if_changed(self) -> None:
        """Use renewed files for new connections. While they cannot be used, the old certificate stays in use.

        A renewal may replace the two files one after the other, so that they do not match for a moment.
        """
        stamps = self._read_stamps()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            self._new_context()  # a failure would leave the context in use without a key
            self._load_into(self.context)
        except BadSettings as error:
            logger.warning("%s; the old certificate stays in use", error)
        else:
            logger.info("the certificate %s was renewed", self._certificate)

    def _read_stamps(self) -> list[tuple[int, int, int] | None]:
        """Return values that change whenever the files change. None stands for a file that cannot be read."""
        return [_stamp(path) for path in (self._certificate, self._key)]

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        self._load_into(context)
        return context

    def _load_into(self, context: ssl.SSLContext) -> None:
        _check_pem("certificate", self._certificate)
        _check_pem("key", self._key)
        try:
            context.load_cert_chain(self._certificate, self._key, password=_refuse_password)
        except _EncryptedKey:
            raise BadSettings(
                f"the key {self._key} is encrypted; give --tls-key a key without a passphrase"
            ) from None
        except OSError as error:  # an SSLError, or a file was replaced after the check
            reason = getattr(error, "reason", None)
            if reason == "KEY_VALUES_MISMATCH":
                raise BadSettings(
                    f"the key {self._key} does not belong to the certificate {self._certificate}; give "
                    "--tls-key the key that the certificate was made with. If the file has several "
                    "certificates, the gateway's own must be the first"
                ) from error
            raise BadSettings(
                f"the certificate {self._certificate} or its key {self._key} cannot be used "
                f"({reason or error}); give --tls-certificate and --tls-key files in PEM format"
            ) from error


def _refuse_password() -> NoReturn:
    raise _EncryptedKey


def _check_pem(what: str, path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadSettings(
            f"the file {path} cannot be read ({error.strerror}); correct --tls-{what} or the permissions"
        ) from error
    if _MARKS[what] not in content:
        raise BadSettings(f"the file {path} has no {what} in PEM format; correct --tls-{what}")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # The ctime, because a renewal hook may change the owner or the mode of the file a moment later.
    return status.st_ctime_ns, status.st_ino, status.st_size
