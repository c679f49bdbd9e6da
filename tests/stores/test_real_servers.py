from __future__ import annotations

import pytest
from redis import Redis

from real_servers import RedisServer


def test_the_shared_redis_answers(redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        assert redis.set("test_real_servers", "1")
        assert redis.get("test_real_servers") == b"1"


@pytest.mark.slow
def test_a_redis_of_ones_own_keeps_its_data_over_a_stop_and_goes_away_at_the_end() -> None:
    with RedisServer() as server:
        with Redis.from_url(server.url) as redis:
            redis.set("a", "1")
        server.stop()
        server.start()
        with Redis.from_url(server.url) as redis:
            assert redis.get("a") == b"1"
        folder = server.folder
    assert not folder.exists()
