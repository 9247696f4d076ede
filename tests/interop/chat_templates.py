"""Twenty chat templates, in short own words that keep each format: headers, ends of turns, white space, BOS, defaults,
dates, refusals.

`<<` and `>>` stand around what the assistant generates. They become transformers' generation blocks (`marked`) or
nothing (`plain`), as most models ship them. Templates are written over several lines, which are joined; what they
write comes from `{{ }}` alone.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ALTERNATE = (
    "{% for m in messages if m.role in ('user', 'assistant') %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. USER: hello there ASSISTANT: hi, how can I help you today?",
    "Name one more city. Another city is Lyon, and its river is the Rhône.",
    '{"name": "weather", "arguments": {"city": "Paris"}}',
]


@dataclass(frozen=True)
class Template:
    """A template with the tokens of its format."""

    body: str
    special: str
    bos: str
    eos: str

    @property
    def marked(self) -> str:
        return _joined(self.body).replace("<<", "{% generation %}").replace(">>", "{% endgeneration %}")

    @property
    def plain(self) -> str:
        return _joined(self.body).replace("<<", "").replace(">>", "")

    def tokenizer(self, text: str | None = None) -> PreTrainedTokenizerFast:
        """A byte-level BPE tokenizer that joins a space with the word after it, as those of Qwen and Llama 3 do."""
        backend = Tokenizer.from_str(_trained())
        special = [self.bos, self.eos, *self.special.split()]
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(special)]
        )
        names = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": "<pad>", "unk_token": "<pad>"}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=self.plain if text is None else text,
            model_max_length=4096,
            **names,
        )


@functools.cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(vocab_size=480, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False),
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return str(backend.to_str())


def _joined(text: str) -> str:
    return re.sub(r"\n\s*", "", text.strip())


def _chatml(before: str = "", content: str = "m.content") -> str:
    return rf"""
    {before}{{% for m in messages %}}
        {{% if m.role == 'assistant' %}}{{{{ '<|im_start|>assistant\n' }}}}<<{{{{ {content} + '<|im_end|>\n' }}}}>>
        {{% else %}}{{{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}}}{{% endif %}}
    {{% endfor %}}
    {{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"""


def _default_system(text: str) -> str:
    return rf"{{% if messages[0].role != 'system' %}}{{{{ '<|im_start|>system\n{text}<|im_end|>\n' }}}}{{% endif %}}"


IM = "<|im_start|> <|im_end|> <|im_sep|>"
INST = "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]"

TEMPLATES = {
    "chatml": Template(_chatml(), IM, "<|endoftext|>", "<|im_end|>"),
    "qwen2.5": Template(
        _chatml(_default_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
        IM,
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "smollm2": Template(
        _chatml(_default_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
        IM,
        "<|im_start|>",
        "<|im_end|>",
    ),
    # Thoughts are shown from the last question on, and left out before it.
    "qwen3": Template(
        r"""
        {% set ns = namespace(last=0) %}
        {% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
        {% for m in messages %}
            {% if m.role == 'assistant' %}
                {% set parts = m.content.split('</think>') %}{% set answer = parts[-1].lstrip('\n') %}
                {% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
                {{ '<|im_start|>assistant\n' }}<<
                {% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ answer + '<|im_end|>\n' }}>>
            {% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
            {% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
        {% endif %}""",
        f"{IM} <think> </think>",
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "smollm3": Template(
        r"""
        {{ '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' + strftime_now('%d %B %Y') + '\n\n' }}
        {{ '## Custom Instructions\n\n' + (messages[0].content if messages[0].role == 'system' else 'You are a helpful AI assistant.') + '\n\n<|im_end|>\n' }}
        {% for m in messages %}
            {% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
            {% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}
                <<{{ m.content.lstrip('\n') + '<|im_end|>\n' }}>>{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}""",
        f"{IM} <think> </think>",
        "<|begin_of_text|>",
        "<|im_end|>",
    ),
    "llama-3": Template(
        r"""
        {{ bos_token }}{% for m in messages %}
            {{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
            {% if m.role == 'assistant' %}<<{{ m.content | trim + '<|eot_id|>' }}>>{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
        "<|start_header_id|> <|end_header_id|> <|eot_id|>",
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "gemma-2": Template(
        rf"""
        {{{{ bos_token }}}}{NO_SYSTEM}{ALTERNATE}{{% for m in messages %}}
            {{% if m.role == 'assistant' %}}{{{{ '<start_of_turn>model\n' }}}}<<{{{{ m.content | trim + '<end_of_turn>\n' }}}}>>
            {{% else %}}{{{{ '<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n' }}}}{{% endif %}}
        {{% endfor %}}
        {{% if add_generation_prompt %}}{{{{ '<start_of_turn>model\n' }}}}{{% endif %}}""",
        "<start_of_turn> <end_of_turn>",
        "<bos>",
        "<eos>",
    ),
    # The system text stands at the head of the first user turn.
    "gemma-3": Template(
        rf"""
        {{{{ bos_token }}}}{ALTERNATE}{{% set head = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}}
        {{% for m in messages if m.role != 'system' %}}
            {{% if m.role == 'assistant' %}}{{{{ '<start_of_turn>model\n' }}}}<<{{{{ m.content | trim + '<end_of_turn>\n' }}}}>>
            {{% else %}}{{{{ '<start_of_turn>user\n' + (head if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}}}{{% endif %}}
        {{% endfor %}}
        {{% if add_generation_prompt %}}{{{{ '<start_of_turn>model\n' }}}}{{% endif %}}""",
        "<start_of_turn> <end_of_turn>",
        "<bos>",
        "<eos>",
    ),
    # Whatever asks for no answer ends the conversation, prompts too.
    "phi-3": Template(
        r"""
        {% for m in messages %}
            {{ '<|' + m.role + '|>\n' }}
            {% if m.role == 'assistant' %}<<{{ m.content + '<|end|>\n' }}>>{% else %}{{ m.content + '<|end|>\n' }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}<<{{ eos_token }}>>{% endif %}""",
        "<|system|> <|user|> <|assistant|> <|end|>",
        "<s>",
        "<|endoftext|>",
    ),
    "phi-4": Template(
        r"""
        {% for m in messages %}
            {{ '<|im_start|>' + m.role + '<|im_sep|>' }}
            {% if m.role == 'assistant' %}<<{{ m.content + '<|im_end|>' }}>>{% else %}{{ m.content + '<|im_end|>' }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""",
        IM,
        "<|endoftext|>",
        "<|im_end|>",
    ),
    # No header of an answer: the end of the question is one. Plain text, no special tokens but those of the sequence.
    "mistral-v0.1": Template(
        rf"""
        {{{{ bos_token }}}}{NO_SYSTEM}{ALTERNATE}{{% for m in messages %}}
            {{% if m.role == 'user' %}}{{{{ '[INST] ' + m.content + ' [/INST]' }}}}{{% else %}}<<{{{{ m.content + eos_token }}}}>>{{% endif %}}
        {{% endfor %}}""",
        "",
        "<s>",
        "</s>",
    ),
    # The system text and the tools stand in the last user turn, and only while it is the last turn of all.
    "mistral-v0.3": Template(
        rf"""
        {{{{ bos_token }}}}{ALTERNATE}{{% set turns = messages[1:] if messages[0].role == 'system' else messages %}}
        {{% for m in turns %}}
            {{% if m.role == 'user' %}}
                {{% if tools and loop.last %}}{{{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}}}{{% endif %}}
                {{{{ '[INST] ' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '') + m.content + '[/INST]' }}}}
            {{% else %}}<<{{{{ ' ' + m.content | trim + eos_token }}}}>>{{% endif %}}
        {{% endfor %}}""",
        INST,
        "<s>",
        "</s>",
    ),
    "mistral-tekken": Template(
        r"""
        {{ bos_token }}{% if messages[0].role != 'system' %}
            {{ '[SYSTEM_PROMPT]You are a helpful assistant. The current date is ' + strftime_now('%Y-%m-%d') + '.[/SYSTEM_PROMPT]' }}{% endif %}
        {% for m in messages %}
            {% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
            {% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
            {% else %}<<{{ m.content + eos_token }}>>{% endif %}
        {% endfor %}""",
        INST,
        "<s>",
        "</s>",
    ),
    # The prompt opens a thought that no answer has.
    "deepseek-v3": Template(
        r"""
        {{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
        {% for m in messages %}
            {% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
            {% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' }}<<{{ m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}>>{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}""",
        "<｜User｜> <｜Assistant｜> <think> </think>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    # An answer has no end of its own: the next header ends it.
    "glm-4": Template(
        r"""
        {{ '[gMASK]<sop>' }}{% for m in messages %}
            {{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}<<{{ '\n' + m.content }}>>{% else %}{{ '\n' + m.content }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        "<sop>",
        "<|endoftext|>",
    ),
    "zephyr": Template(
        r"""
        {% for m in messages %}
            {{ '<|' + m.role + '|>' }}
            {% if m.role == 'assistant' %}<<{{ '\n' + m.content + eos_token + '\n' }}>>{% else %}{{ '\n' + m.content + eos_token + '\n' }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
        "",
        "<s>",
        "</s>",
    ),
    "vicuna": Template(
        r"""
        {{ bos_token }}{{ messages[0].content if messages[0].role == 'system' else 'A chat between a curious user and an assistant.' }}
        {% for m in messages %}
            {% if m.role == 'user' %}{{ ' USER: ' + m.content }}
            {% elif m.role == 'assistant' %}{{ ' ASSISTANT:' }}<<{{ ' ' + m.content + eos_token }}>>{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}""",
        "",
        "<s>",
        "</s>",
    ),
    # The last answer ends with another token than those before it.
    "gpt-oss": Template(
        r"""
        {{ '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: medium<|end|>' }}
        {% for m in messages %}
            {% if m.role == 'system' %}{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '\n\n<|end|>' }}
            {% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
            {% else %}{{ '<|start|>assistant' }}<<{{ '<|channel|>final<|message|>' + m.content }}
                {% if loop.last and not add_generation_prompt %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}>>{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}""",
        "<|start|> <|message|> <|channel|> <|end|>",
        "<|startoftext|>",
        "<|return|>",
    ),
    "granite": Template(
        r"""
        {{ '<|start_of_role|>system<|end_of_role|>' }}
        {{ messages[0].content if messages[0].role == 'system' else "Today's Date: " + strftime_now('%B %d, %Y') + '.\nYou are Granite, developed by IBM.' }}
        {{ '<|end_of_text|>\n' }}
        {% for m in messages if m.role != 'system' %}
            {{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}
            {% if m.role == 'assistant' %}<<{{ m.content + '<|end_of_text|>\n' }}>>{% else %}{{ m.content + '<|end_of_text|>\n' }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}""",
        "<|start_of_role|> <|end_of_role|> <|end_of_text|>",
        "<|end_of_text|>",
        "<|end_of_text|>",
    ),
    "olmo-2": Template(
        r"""
        {{ bos_token }}{% for m in messages %}
            {{ '<|' + m.role + '|>\n' }}
            {% if m.role == 'assistant' %}<<{{ m.content + eos_token }}>>{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ m.content + '\n' }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
        "",
        "<|endoftext|>",
        "<|endoftext|>",
    ),
}
assert len(TEMPLATES) == 20

HEADER_WITH_A_SPACE = Template(
    r"""
    {% for m in messages %}
        {{ m.role.capitalize() + ': ' }}{% if m.role == 'assistant' %}<<{{ m.content + eos_token + '\n' }}>>{% else %}{{ m.content + '\n' }}{% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}""",
    "",
    "<s>",
    "</s>",
)
