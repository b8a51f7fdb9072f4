import asyncio

from pointillist.base.budget import ByteBudget


async def test_requests_wait_for_room_in_order_and_a_large_one_is_served_alone() -> None:
    budget, order = ByteBudget(100), []

    async def request(name: str, size: int) -> None:
        share = await budget.take(size)
        order.append((name, budget.held))
        await asyncio.sleep(0.01)
        share.release()
        share.release()  # a second time does nothing

    await asyncio.gather(*(request(*each) for each in [("a", 60), ("b", 30), ("huge", 500), ("c", 10)]))
    assert order == [("a", 60), ("b", 90), ("huge", 500), ("c", 10)]
    assert budget.held == 0
