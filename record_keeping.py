"""From the desk to the ledger: which outcomes are kept, and which answers are scored."""

from answer_desk import SHARED_S, AnswerRecord, Observer, Outcome
from domain import ForecastRequest
from ledger import AnswerEntry, Ledger, PromptEntry
from own_scores import scored_by
from protocol import ProtocolProfile


def keeper(ledger: Ledger, profile: ProtocolProfile) -> Observer:
    """An observer of the desk that keeps its records.

    Requests that were turned away unread are left to the metrics: a flood of them
    must not push the others out. Scored are live answers to prompts of the usual
    form, asked as late as validators ask, each once, in the paths of the engine
    before they were written down.
    """

    def keep(record: AnswerRecord) -> None:
        if record.request is not None:
            ledger.keep(_prompt(record, record.request), _answer(record, profile))

    return keep


def _prompt(record: AnswerRecord, request: ForecastRequest) -> PromptEntry:
    diagnostics = record.diagnostics
    return PromptEntry(
        at=record.at,
        caller=record.caller.name,
        transport=record.caller.transport,
        request=request,
        origin=record.origin,
        outcome=record.outcome.value,
        rung=diagnostics.rung if diagnostics else None,
        price_age_s=diagnostics.price_age_s if diagnostics else None,
        ms=record.ms,
        size=record.size,
        reason=record.reason,
    )


def _answer(record: AnswerRecord, profile: ProtocolProfile) -> AnswerEntry | None:
    forecast = record.forecast
    if record.outcome is not Outcome.COMPUTED or forecast is None or record.origin is not None:
        return None
    if forecast.request.start_ts - record.at > SHARED_S:
        return None  # validators get a later one, which is then the first that is kept
    competition = scored_by(profile, forecast.request)
    if competition is None:
        return None
    return AnswerEntry(
        frequency=forecast.diagnostics.frequency,
        rung=forecast.diagnostics.rung,
        model_id=forecast.diagnostics.model_id,
        paths=forecast.paths,
        competition=competition,
    )
