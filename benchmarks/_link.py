"""A slow link to a server on loopback: a relay that delays and paces what it passes on.

All connections share the rate of one direction, from the server to its clients. Each has at most
`WINDOW` bytes on the link, as TCP has; slow start and losses are not modelled. It is a process of
its own, which is killed at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

WINDOW = 4 << 20
PIECE = 16 << 10


class Link:
    """The relay.

    Args:
        port: of the server.
        rate: bytes a second.
        delay: seconds of one way.
    """

    def __init__(self, port: int, rate: float, delay: float) -> None:
        self._port = port
        self._rate = rate
        self._delay = delay
        self._free = 0.0  # when the last byte that was given to the link has left it

    async def serve(self) -> None:
        """Listen, tell the port, and pass on what comes until the process is killed."""
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * self._delay)  # the handshake, which loopback has finished
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
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
    """Put a link before a server on loopback.

    Args:
        address: of the server, as in ``http://127.0.0.1:1234``.
        rate: bytes a second, of all connections together.
        delay: seconds of one way.

    Yields:
        Its address behind the link.
    """
    command = [sys.executable, __file__, address.rpartition(":")[2], str(rate), str(delay)]
    relay = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )  # what it says of connections that clients drop is of no use
    try:
        assert relay.stdout is not None
        yield f"http://127.0.0.1:{int(relay.stdout.readline())}"
    finally:
        relay.kill()
        relay.communicate()


if __name__ == "__main__":
    asyncio.run(Link(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])).serve())
