"""Names of attributes: ours, and those of OpenTelemetry's semantic conventions, which are kept as text so that who traces
nothing needs no package of theirs. A test holds them against the conventions.
"""

from __future__ import annotations

from typing import Final

# ours
SESSION_ID: Final = "longshift.session.id"
TURN_ID: Final = "longshift.turn.id"
BATCH_ID: Final = "longshift.batch.id"
WORKER_ID: Final = "longshift.worker.id"
CALL_ID: Final = "longshift.call.id"
REQUEST_ID: Final = "longshift.request.id"
ATTEMPT: Final = "longshift.attempt"
ATTEMPT_OUTCOME: Final = "longshift.attempt.outcome"
EPOCH: Final = "longshift.epoch"
TURN_STATUS: Final = "longshift.turn.status"
STEP_KEY: Final = "longshift.step.key"
STEP_OUTCOME: Final = "longshift.step.outcome"
STEP_TRIES: Final = "longshift.step.tries"
TOOL_EFFECT: Final = "longshift.tool.effect"

# of OpenTelemetry
ERROR_TYPE: Final = "error.type"
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
AGENT_NAME: Final = "gen_ai.agent.name"
AGENT_VERSION: Final = "gen_ai.agent.version"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_STREAM: Final = "gen_ai.request.stream"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS: Final = "gen_ai.usage.cache_creation.input_tokens"
