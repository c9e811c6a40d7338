"""A slow link to a server on loopback: a relay that delays and paces what it passes on.

All connections share the rate of one direction, from the server to its clients. Each has at most
`WINDOW` bytes on the link, as TCP has; slow start and losses are not modelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

WINDOW = 4 << 20
PIECE = 16 << 10


class Link:
    """The relay; its loop runs in a thread of its own.

    Args:
        server: host and port that are behind it.
        rate: bytes a second.
        delay: seconds of one way.
    """

    def __init__(self, server: tuple[str, int], rate: float, delay: float) -> None:
        self._server = server
        self._rate = rate
        self._delay = delay
        self._free = 0.0  # when the last byte that was given to the link has left it
        self.port = 0

    async def serve(self) -> None:
        """Begin to listen."""
        listening = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        self.port = listening.sockets[0].getsockname()[1]

    async def end(self) -> None:
        """Drop what is under way."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * self._delay)  # the handshake, which loopback has finished
        far_reader, far_writer = await asyncio.open_connection(*self._server)
        with contextlib.suppress(asyncio.CancelledError):  # it ends
            await asyncio.gather(
                self._pass_on(reader, far_writer, paced=False),
                self._pass_on(far_reader, writer, paced=True),
                return_exceptions=True,
            )

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, paced: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WINDOW // PIECE)

        async def arrive() -> None:
            with contextlib.suppress(ConnectionError):  # the client has closed it
                while True:
                    due, piece = await under_way.get()
                    await asyncio.sleep(due - loop.time())
                    if not piece:
                        break
                    writer.write(piece)
                    await writer.drain()

        arriving = asyncio.create_task(arrive())
        with contextlib.closing(writer):
            while not arriving.done():
                piece = await reader.read(PIECE)
                left = loop.time()
                if paced:
                    left = self._free = max(self._free, left) + len(piece) / self._rate
                await under_way.put((left + self._delay, piece))
                if not piece:
                    break
            await arriving


@contextlib.contextmanager
def linked(address: str, rate: float, delay: float) -> Iterator[str]:
    """Put a link before a server.

    Args:
        address: of the server, as in ``http://127.0.0.1:1234``.
        rate: bytes a second, of all connections together.
        delay: seconds of one way.

    Yields:
        Its address behind the link.
    """
    host, _, port = address.rpartition("://")[2].partition(":")
    link = Link((host, int(port)), rate, delay)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(link.serve(), loop).result(10)
        yield f"http://127.0.0.1:{link.port}"
    finally:
        asyncio.run_coroutine_threadsafe(link.end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
