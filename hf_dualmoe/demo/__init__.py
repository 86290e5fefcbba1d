"""A page in the browser that shows one image, what the models say about it, and what an attack makes of it.

python -m hf_dualmoe.demo --model outputs/digits-jtdmoe/model
python -m hf_dualmoe.demo --model user/model --export my_space    # the same page as a Space of the Hub

`scene` computes, `words` and `pictures` describe, `page` shows it with Gradio, `space` exports.

Calls: attacks, data, hub, models.
"""
