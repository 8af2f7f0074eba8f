"""All that the page says, in English and in Chinese.

What stands still is translated in the browser, by its language (`i18n`); what is made for a reply
is made here, by the language that the browser asks for (`words_for`).
"""

from collections.abc import Callable

import gradio as gr

Words = Callable[..., str]

TEXTS = {
    # key: (English, Chinese)
    "title": ("Llama 3, streamed", "Llama 3 流式对话"),
    "new": ("New conversation", "新对话"),
    "conversations": ("Conversations", "对话"),
    "settings": ("Settings", "设置"),
    "message": ("Message", "消息"),
    "ask": (
        "Ask something. Enter sends it, Shift+Enter makes a new line.",
        "输入消息。Enter 发送，Shift+Enter 换行。",
    ),
    "chat": ("Conversation", "对话内容"),
    "welcome": (
        "### What shall we talk about?\n\nThe reply appears as the model writes it.",
        "### 想聊点什么？\n\n模型边写，回复边显示。",
    ),
    "go_on": ("Continue", "继续"),
    "again": ("Try again", "重试"),
    "export_markdown": ("Save .md", "导出 .md"),
    "export_json": ("Save .json", "导出 .json"),
    "you": ("You", "您"),
    "model": ("Model", "模型"),
    "send": ("Send", "发送"),
    "halt": ("Stop", "停止"),
    "edit": ("Your message, to be edited", "编辑消息"),
    # settings
    "preset": ("Preset", "预设"),
    "preset_none": ("None", "无"),
    "preset_brief": ("Brief", "简洁"),
    "preset_teacher": ("Teacher", "老师"),
    "preset_programmer": ("Programmer", "程序员"),
    "preset_translator": ("Translator", "翻译"),
    "system_prompt": ("System prompt", "系统提示词"),
    "system_prompt_hint": ("How the model should behave", "希望模型如何表现"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": ("0 always takes the likeliest token", "0 总是取最可能的词元"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k", "Top-k"),
    "top_k_info": ("0: no limit", "0 表示不限"),
    "min_p": ("Min-p", "Min-p"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "min_new_tokens": ("Minimum tokens", "最少词元数"),
    "max_new_tokens": ("Maximum tokens", "最多词元数"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("Empty: another one each time", "留空则每次不同"),
    "stop": ("Stop strings", "停止字符串"),
    "stop_info": ("One a line", "每行一个"),
    "between": ("Between {least} and {greatest}", "介于 {least} 与 {greatest} 之间"),
    "reset": ("As the model's own", "恢复模型默认值"),
    # tokens
    "token_view": ("Token view", "词元视图"),
    "token_view_info": (
        "Tints each token of the next replies by its probability; an alternative can be taken",
        "为之后回复的每个词元按概率着色，并可改选其他词元",
    ),
    "tokens_hint": (
        "The paler, the surer. Point at a token, or move to it with the keyboard, for its "
        "alternatives; take one to go on from there.",
        "颜色越浅，模型越确定。用鼠标或键盘移到词元上查看其他候选，选择一个即从该处重新生成。",
    ),
    "tokens_none": (
        "Send a message: its reply is shown here token by token.",
        "发送一条消息后，回复会在这里逐个词元显示。",
    ),
    # a reply
    "thinking": ("Thinking…", "思考中…"),
    "thought": ("Thought", "思考过程"),
    "queued": ("Place {position} in the queue", "排队第 {position} 位"),
    "reading": ("Reading {prompt} tokens", "正在读取 {prompt} 个词元"),
    "asking": ("Asking the service", "正在连接服务"),
    "prompt": ("{prompt} prompt tokens", "提示 {prompt} 个词元"),
    "cached": ("{cached} from the cache", "其中 {cached} 个来自缓存"),
    "first": ("first token after {ms} ms", "首个词元 {ms} 毫秒"),
    "rate": ("{rate} tokens/s", "{rate} 词元/秒"),
    "written": ("{n} tokens", "{n} 个词元"),
    "context": ("context {used} of {whole}", "上下文 {used} / {whole}"),
    "trimmed": ("{n} earlier messages left out", "省略了较早的 {n} 条消息"),
    "ended_stop": ("complete", "已完成"),
    "ended_length": ("ended at the maximum length", "达到最大长度"),
    "ended_abort": ("stopped", "已停止"),
    "used": ("Settings used", "所用设置"),
    # what goes wrong
    "away": (
        "The service is not there. Start llama3_service.py, then try again.",
        "服务没有运行。请启动 llama3_service.py，然后重试。",
    ),
    "loading": (
        "The service is loading its model or shutting down. Try again in a moment.",
        "服务正在加载模型或正在关闭。请稍后重试。",
    ),
    "full": (
        "The service is busy with others and its queue is full. Try again in a moment.",
        "服务繁忙，队列已满。请稍后重试。",
    ),
    "key": (
        "The service asks for a key. Whoever runs this page must set LLAMA3_API_KEY to a valid one "
        "and start the page again.",
        "服务需要密钥。请页面的管理者把 LLAMA3_API_KEY 设为有效的密钥，并重新启动页面。",
    ),
    "too_long": (
        "This does not fit into the model's context. Shorten the message, or begin a new "
        "conversation.",
        "内容超出了模型的上下文。请缩短消息，或开始新对话。",
    ),
    "broken": (
        "The connection to the service was lost in the middle of the reply. What had come is kept: "
        "continue it, or try again.",
        "回复过程中与服务的连接断开。已收到的内容已保留：可以继续，也可以重试。",
    ),
    "refused": ("The service could not reply: {why}", "服务无法回复：{why}"),
    "not_a_conversation": (
        "This file is not a conversation saved by this page as JSON.",
        "该文件不是由本页面导出的 JSON 对话。",
    ),
    "no_reply": ("No reply was kept.", "没有保存的回复。"),
    "too_large": (
        "This message, or this conversation, is too long to be kept. Shorten the message, or begin "
        "a new conversation.",
        "消息或对话过长，无法保存。请缩短消息，或开始新对话。",
    ),
    "failed": (
        "This page made a mistake; its log tells more. What has been kept is shown.",
        "页面出错，详情见日志。现在显示的是已保存的内容。",
    ),
    "ready": ("context of {context} tokens", "上下文 {context} 个词元"),
    # beside the conversations; used in the browser alone
    "kept_where": (
        "Kept in this browser only, not on the server.",
        "对话只保存在此浏览器中，不在服务器上。",
    ),
    "none_yet": ("No conversations yet.", "还没有对话。"),
    "delete": ("Delete", "删除"),
    "delete_sure": ("Delete this conversation?", "删除这个对话？"),
    "import": ("Open a JSON file", "导入 JSON"),
    "storage_full": (
        "The browser's storage is full, so this conversation is not kept. Save it as a file, and "
        "delete others.",
        "浏览器存储空间已满，此对话未被保存。请导出为文件，并删除其他对话。",
    ),
    "file_too_large": ("This file is too large.", "文件过大。"),
}

PRESETS = {
    # preset: the system prompt itself, in both languages
    "preset_none": ("", ""),
    "preset_brief": ("Answer in as few words as possible.", "请用尽量少的字回答。"),
    "preset_teacher": (
        "You are a patient teacher. Explain step by step, with an example, and end with one "
        "question that checks understanding.",
        "你是一位耐心的老师。请一步一步讲解并举例，最后提一个检查理解的问题。",
    ),
    "preset_programmer": (
        "You are an experienced programmer. Answer with working code first, then explain it "
        "briefly.",
        "你是一位经验丰富的程序员。请先给出可以运行的代码，再作简短说明。",
    ),
    "preset_translator": (
        "Translate what you are given: Chinese into English, anything else into Chinese. Give the "
        "translation alone.",
        "翻译用户给出的内容：中文译成英文，其他语言译成中文。只给出译文。",
    ),
}

_COLUMNS = {"en": 0, "zh": 1}
_ENGLISH, _CHINESE = ({key: text[n] for key, text in TEXTS.items()} for n in _COLUMNS.values())

i18n = gr.I18n(en=_ENGLISH, zh=_CHINESE, **{"zh-CN": _CHINESE, "zh-TW": _CHINESE})


def language_of(request: gr.Request | None) -> str:
    """ "zh" or "en", by what the browser asks for first."""
    accepted = request.headers.get("accept-language", "") if request else ""
    return "zh" if accepted.strip().lower().startswith("zh") else "en"


def words_for(language: str) -> Words:
    """A function from a key, and what fills its gaps, to the text in that language."""
    column = _COLUMNS[language]
    return lambda key, **gaps: TEXTS[key][column].format(**gaps)


def words_of(request: gr.Request | None) -> Words:
    return words_for(language_of(request))


def preset(name: str, language: str) -> str:
    """The system prompt of a preset."""
    return PRESETS[name][_COLUMNS[language]]


def preset_of(system_prompt: str) -> str | None:
    """Which preset a system prompt is, in whatever language."""
    return next((name for name, prompts in PRESETS.items() if system_prompt in prompts), None)


def texts(*keys: str) -> dict[str, dict[str, str]]:
    """Some texts in each language, for scripts of the page."""
    return {lang: {key: TEXTS[key][n] for key in keys} for lang, n in _COLUMNS.items()}
