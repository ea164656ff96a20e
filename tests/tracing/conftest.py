from tests.api.conftest import engine, make_app

__all__ = ["engine", "make_app"]
