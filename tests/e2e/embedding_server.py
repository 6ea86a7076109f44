# SPDX-License-Identifier: Apache-2.0
"""A server that embeds vLLM's serving classes as others do: without its HTTP app, so without middleware.

Takes the arguments of `vllm serve`. One task answers all requests, one after the other.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.cohere.protocol import CohereChatV2Request
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

Answer = Callable[[Any, Any], Awaitable[Any]]
Waiting = asyncio.Queue[tuple[Answer, Any, asyncio.Future[Any]]]


async def answer_all(waiting: Waiting) -> None:
    while True:
        answer, request, answered = await waiting.get()
        try:
            answered.set_result(await answer(request, None))
        except VLLMValidationError as error:
            answered.set_exception(error)


def declared_early(app: FastAPI, path: str) -> Callable[[Any], None]:
    """A route whose models are those of a vLLM without plugins; what answers comes later."""
    answers: list[Answer] = []

    @app.post(path)
    async def answer(request: AnthropicMessagesRequest) -> JSONResponse:
        return JSONResponse((await answers[0](request, None)).model_dump())

    return answers.append


async def main() -> None:
    app = FastAPI()
    answer_early = declared_early(app, "/early/v1/messages")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
    async with build_async_engine_client(args) as engine:
        state, waiting = State(), Waiting()
        await init_app_state(engine, state, args, await engine.get_supported_tasks())
        worker = asyncio.create_task(answer_all(waiting))
        answer_early(state.anthropic_serving_messages.create_messages)

        @app.get("/health")
        async def health() -> None: ...

        async def answer(by: Answer, request: Any) -> JSONResponse:
            answered = asyncio.get_running_loop().create_future()
            await waiting.put((by, request, answered))
            try:
                return JSONResponse((await answered).model_dump())
            except VLLMValidationError as error:
                return JSONResponse({"error": {"message": str(error)}}, status_code=400)

        @app.post("/v1/chat/completions")
        async def chat(request: ChatCompletionRequest) -> JSONResponse:
            return await answer(state.openai_serving_chat.create_chat_completion, request)

        @app.post("/v1/messages")
        async def messages(request: AnthropicMessagesRequest) -> JSONResponse:
            return await answer(state.anthropic_serving_messages.create_messages, request)

        @app.post("/v1/messages/count_tokens")
        async def count_tokens(request: AnthropicCountTokensRequest) -> JSONResponse:
            return await answer(state.anthropic_serving_messages.count_tokens, request)

        @app.post("/cohere/v2/chat")
        async def cohere_chat(request: CohereChatV2Request) -> JSONResponse:
            return await answer(state.cohere_serving_chat_v2.create_chat_v2, request)

        @app.post("/tokenize")
        async def tokenize(request: TokenizeChatRequest) -> JSONResponse:
            return await answer(state.serving_tokenization.create_tokenize, request)

        # uvicorn raises what has stopped it once more at its end, which would leave the engine behind.
        signal.signal(signal.SIGTERM, lambda *_: None)
        await uvicorn.Server(uvicorn.Config(app, host=args.host, port=args.port)).serve()
        worker.cancel()


if __name__ == "__main__":
    asyncio.run(main())
