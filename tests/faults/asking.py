"""One small prompt to an engine, its answer held against the validator's rules."""

from domain import Forecast, ForecastRequest
from forecast_engine import ForecastEngine
from wire_format import encode_prompt_answer, validate_answer


def ask(engine: ForecastEngine) -> Forecast:
    """The valid answer to an HF prompt for the next minute."""
    request = ForecastRequest(
        asset="BTC",
        start_ts=engine.now() // 60 * 60 + 60,
        increment_s=60,
        length_s=3600,
        num_paths=20,
    )
    answer = engine.answer(request)
    validate_answer(encode_prompt_answer(answer), request)
    return answer
