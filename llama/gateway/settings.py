"""The gateway's settings: the `LLAMA_GATEWAY_*` environment variables."""

from __future__ import annotations

from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, PositiveFloat, PositiveInt, SecretStr, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode, SettingsConfigDict

from llama.gateway.prices import Prices
from llama.settings import EnvironmentSettings

Network = IPv4Network | IPv6Network
OwnerAndName = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
Origin = Annotated[str, Field(pattern=r"^(https?://[^/\s]+|\*)$")]
Price = Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
PublicUrl = Annotated[str, Field(pattern=r"^https?://[!-~&&[^/?#;]]+(/[!-~&&[^?#;]]*)?$")]
"""Printable ASCII without `;`, because the path is also that of the page's cookie."""
VersionId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

PUBLISHED_VERSIONS = (
    "02e509c789964a7ea8736978a43525956ef40397be9033abf9fd2badfe68c9e3",
    "2d19859030ff705a87c746f7e96eea03aefb71f166725aee39692f1476566d48",
    "2c1608e18606fad2812020dc541930f2d0495ce32eee50074220b87300bc16e1",
    "2796ee9483c3fd7aa2e171d38f4ca12251a30609463dcfd4cd76703f22e96cdf",
)
"""Versions of Llama 2 70B Chat on Replicate. Programs that name one of them get this gateway's model."""


def _comma_separated(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _sendable(key: SecretStr | None) -> SecretStr | None:
    """Remove the white space around a key: the file of a secret often ends with a line break."""
    if key is None:
        return None
    text = key.get_secret_value().strip()
    if not (text and text.isascii() and text.isprintable()):
        raise PydanticCustomError("key", "should have printable ASCII characters only, and at least one")
    return SecretStr(text)


class GatewaySettings(EnvironmentSettings):
    """One field per variable. `docs/reference.md` describes them."""

    model_config = SettingsConfigDict(env_prefix="LLAMA_GATEWAY_")

    key: SecretStr | None = None
    """A key that clients can use, in addition to those of the command `keys add`."""
    model: OwnerAndName = "meta/llama-2-70b-chat"
    """The name under which clients find the model, as `owner/name`."""
    aliases: Annotated[tuple[str, ...], NoDecode] = ()
    """Other names of the model in OpenAI's API, separated by commas."""
    versions: Annotated[tuple[VersionId, ...], NoDecode] = PUBLISHED_VERSIONS
    """Version ids that are accepted in addition to the model's own, separated by commas."""
    deployments: Annotated[tuple[OwnerAndName, ...], NoDecode] = ()
    """Names of deployments of the model, as `owner/name,...`."""
    database: Path = Path("~/.local/share/llama-cog/gateway.sqlite3")
    """The file that stores predictions, keys and usage. Only one gateway can use it at a time."""
    public_url: PublicUrl | None = None
    """The gateway's address in responses. None means the address that the client used."""
    places: PositiveInt = 32
    """How many predictions a server runs at once. It must not be more than the server's own maximum."""
    queue: PositiveInt = 1000
    """How many predictions of one key may wait."""
    queue_timeout: PositiveFloat = 1800
    """Seconds after which a waiting prediction fails."""
    retention: PositiveFloat = 3600
    """Seconds after which the inputs and the output of a finished prediction are deleted."""
    max_body: Annotated[ByteSize, Field(gt=0)] = ByteSize(1_000_000)
    """The maximum size of a request's body."""
    webhook_networks: Annotated[tuple[Network, ...], NoDecode] = ()
    """Private networks that webhooks may reach, such as `10.0.0.0/8`, separated by commas."""
    allowed_origins: Annotated[tuple[Origin, ...], NoDecode] = ()
    """Origins whose pages may use the API from a browser, separated by commas."""
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode] = ()
    """Addresses or networks of the proxies whose `X-Forwarded-*` headers are trusted, separated by commas."""

    input_price: Price = Decimal("0.65")
    """Dollars per million input tokens. The default is the price of Llama 2 70B Chat on Replicate."""
    output_price: Price = Decimal("2.75")
    """Dollars per million output tokens."""
    metrics_key: SecretStr | None = None
    """The key that `/metrics` needs if clients need a key."""
    notice: str | None = None
    """A text that the page shows in a new chat, such as which model answers."""
    log_format: Literal["text", "json"] = "text"
    """The format of the log. With `json`, HTTP requests are logged, too."""

    @property
    def prices(self) -> Prices:
        return Prices(self.input_price, self.output_price)

    _strip = field_validator("key", "metrics_key")(_sendable)
    _split = field_validator(
        "aliases",
        "versions",
        "deployments",
        "webhook_networks",
        "allowed_origins",
        "trusted_proxies",
        mode="before",
    )(_comma_separated)
