"""By which names a server may be asked, and by pages of which sites.

A page of another site can't read a local server's answers, unless its own name is made to lead here
(DNS rebinding): to the browser it then asks its own site. The name stands in `Host`, which no page
can change, so a name that isn't ours is refused, and so is a foreign `Origin`.
"""

import ipaddress
from collections.abc import Iterable

from gpt2_jax.core.errors import brief
from gpt2_jax.serving.schemas import ApiError


class Hosts:
  """The names of a server: of the loopback, of what it is bound to, and others that are allowed."""

  def __init__(self, allowed: Iterable[str] = (), origins: Iterable[str] = ()):
    """
    Args:
      allowed: names and addresses by which it may be asked; '*': any.
      origins: sites whose pages may ask, as `https://example.org`; '*': all.
    """
    self._names = {'localhost', *(name.lower() for name in allowed)}
    self._origins = {origin.lower() for origin in origins}
    self._any_address = False

  def bound(self, address: str) -> None:
    """Tells where the server listens. Where that is everywhere, it goes by any address, since only
    a name can be made to lead to another machine.
    """
    self._names.add(address.lower())
    ip = _ip(address)
    self._any_address |= ip is not None and ip.is_unspecified

  def check(self, headers: dict[bytes, bytes]) -> None:
    """Checks a request's `Host` and `Origin`; one without a `Host` (HTTP/1.0) is no browser's.

    Raises:
      ApiError: 403, with the flag that would allow it.
    """
    host = headers.get(b'host', b'').decode('latin-1')
    if host and not self._admits(host):
      raise ApiError(
        403,
        f'This server does not go by the name of {brief(_name(host))}, of the header Host: ask it by '
        'its address, or start it with --allow-host NAME.',
        code='host_not_allowed',
      )
    origin = headers.get(b'origin', b'').decode('latin-1').lower()
    own = origin.partition('://')[2] == host.lower() != ''
    if origin and not own and not self._origins & {origin, '*'}:
      raise ApiError(
        403,
        f'Pages of {brief(origin)} may not ask this server: start it with --allow-origin ORIGIN.',
        code='origin_not_allowed',
      )

  def _admits(self, host: str) -> bool:
    name = _name(host)
    ip = _ip(name)
    if ip is not None and (ip.is_loopback or self._any_address):
      return True
    return bool(self._names & {name, '*'})


def _name(host: str) -> str:
  """The name in a `Host`, without its port."""
  name = host[1:].partition(']')[0] if host.startswith('[') else host.partition(':')[0]
  return name.lower().removesuffix('.')


def _ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
  try:
    return ipaddress.ip_address(name)
  except ValueError:
    return None
