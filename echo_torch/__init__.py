"""Send what PyTorch training loops produce to an `echo <https://github.com/instadeepai/echo>`_ replay buffer."""

try:
    import fcntl as _fcntl  # noqa: F401
except ImportError as error:
    raise ImportError("echo_torch runs on Linux and macOS; on Windows, use it under WSL") from error

from .client.tcp_client import Client, TcpClient
from .errors import (
    CertificateError,
    ConnectionClosedError,
    DeliveryTimeoutError,
    HandshakeError,
    LearnerGoneError,
    ProtocolError,
    SpecMismatchError,
)
from .learner.dataset import EchoDataset
from .metrics.stats import PeerStats, SinkStats
from .samples.spec import numpy_example
from .sink import EchoSink
from .wire.tls import TLS

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "CertificateError",
    "Client",
    "ConnectionClosedError",
    "DeliveryTimeoutError",
    "EchoDataset",
    "EchoSink",
    "HandshakeError",
    "LearnerGoneError",
    "PeerStats",
    "ProtocolError",
    "SinkStats",
    "SpecMismatchError",
    "TcpClient",
    "__version__",
    "numpy_example",
]
