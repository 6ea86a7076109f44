# SPDX-License-Identifier: Apache-2.0
"""A server that embeds vLLM's serving classes as others do: without its HTTP app, so without middleware.

Takes the arguments of `vllm serve`. One task answers all requests, one after the other.
"""

import asyncio
import signal
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

Waiting = asyncio.Queue[tuple[ChatCompletionRequest, asyncio.Future[Any]]]


async def answer_all(serving: Any, waiting: Waiting) -> None:
    while True:
        request, answered = await waiting.get()
        try:
            answered.set_result(await serving.create_chat_completion(request, None))
        except VLLMValidationError as error:
            answered.set_exception(error)


async def main() -> None:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
    async with build_async_engine_client(args) as engine:
        state, waiting = State(), Waiting()
        await init_app_state(engine, state, args, await engine.get_supported_tasks())
        worker = asyncio.create_task(answer_all(state.openai_serving_chat, waiting))
        app = FastAPI()

        @app.get("/health")
        async def health() -> None: ...

        @app.post("/v1/chat/completions")
        async def chat(request: ChatCompletionRequest) -> JSONResponse:
            answered = asyncio.get_running_loop().create_future()
            await waiting.put((request, answered))
            try:
                return JSONResponse((await answered).model_dump())
            except VLLMValidationError as error:
                return JSONResponse({"error": {"message": str(error)}}, status_code=400)

        # uvicorn raises what has stopped it once more at its end, which would leave the engine behind.
        signal.signal(signal.SIGTERM, lambda *_: None)
        await uvicorn.Server(uvicorn.Config(app, host=args.host, port=args.port)).serve()
        worker.cancel()


if __name__ == "__main__":
    asyncio.run(main())
