"""What holds for the whole run."""

from tests import ranks


def pytest_sessionfinish() -> None:
    """End the ranks: a pytest-xdist worker ends without the atexit handlers that would."""
    ranks.close()
