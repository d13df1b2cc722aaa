"""Cases for `tests/op_cases.rs`: ops of ONNX Runtime's own domain, and what it gives for random operands.

    python make_op_goldens.py FOLDER

FOLDER then has a folder for each case; zipped they are `ops.zip`. That has some more: models of skl2onnx, and ONNX's ops
of regions, texts and old forms, made the same way. ONNX Runtime names the ops that it has no CPU kernel for.
"""
import os, shutil, sys, traceback
import numpy as np, onnx
from onnx import helper as h, TensorProto as T, numpy_helper as nh
import onnxruntime as ort
ort.set_default_logger_severity(4)
ROOT=sys.argv[1]
BAD=[]
def vi(name,a):
    if isinstance(a, np.ndarray) and a.dtype.kind in 'OUS':
        return h.make_tensor_value_info(name,T.STRING,list(a.shape))
    return h.make_tensor_value_info(name,h.np_dtype_to_tensor_dtype(a.dtype),list(a.shape))
def case(name, nodes, inputs, outs, opset=17, ms=1, consts=None, ml=None, extra_opsets=(), root=None, dtype_out=None, symbolic=True):
    """nodes: list of NodeProto; inputs: dict name->array; outs: list of names"""
    if not isinstance(nodes,list): nodes=[nodes]
    ops=[h.make_opsetid('',opset)]
    doms={n.domain for n in nodes}
    if 'com.microsoft' in doms: ops.append(h.make_opsetid('com.microsoft',ms))
    if 'ai.onnx.ml' in doms: ops.append(h.make_opsetid('ai.onnx.ml',ml or 3))
    g=h.make_graph(nodes,'g',[vi(k,v) for k,v in inputs.items()],
        [h.make_empty_tensor_value_info(o) for o in outs],
        [nh.from_array(v,k) for k,v in (consts or {}).items()])
    m=h.make_model(g,opset_imports=ops,ir_version=9 if opset<22 else 10)
    try:
        so=ort.SessionOptions(); so.graph_optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        so.log_severity_level=4
        s=ort.InferenceSession(m.SerializeToString(),so,providers=['CPUExecutionProvider'])
        r=s.run(None,inputs)
    except Exception as e:
        BAD.append((name,str(e)[:230])); return None
    d=os.path.join(root or ROOT,name); shutil.rmtree(d,ignore_errors=True); os.makedirs(d+'/test_data_set_0')
    for o,v in zip(g.output,r):
        if isinstance(v,list): 
            continue
        o.type.CopyFrom(vi('x',np.asarray(v)).type)
    m=h.make_model(g,opset_imports=ops,ir_version=9 if opset<22 else 10)
    onnx.save(m,d+'/model.onnx')
    for i,(k,v) in enumerate(inputs.items()):
        open(f'{d}/test_data_set_0/input_{i}.pb','wb').write(nh.from_array(v,k).SerializeToString())
    for i,(k,v) in enumerate(zip(outs,r)):
        open(f'{d}/test_data_set_0/output_{i}.pb','wb').write(nh.from_array(np.asarray(v),k).SerializeToString())
    return r
def fresh(root=ROOT): shutil.rmtree(root,ignore_errors=True); os.makedirs(root)
def report():
    for b in BAD: print('ORT refuses',*b)
rng=np.random.default_rng(0)
def f(*s,scale=1.0): return (rng.standard_normal(s)*scale).astype(np.float32)
def ms(op,ins,outs,**a): return h.make_node(op,ins,outs,domain='com.microsoft',**a)
def node(op,ins,outs,**a): return h.make_node(op,ins,outs,**a)
fresh()
i32=lambda *a: np.array(a,np.int32); i64=lambda *a: np.array(a,np.int64)
B,S,N,D=2,5,2,4; H=N*D
# Attention
def att(name,mask=None,past=None,bias_=True,ab=None,outs=('y',),vsize=None,**kw):
    wh=3*H if vsize is None else 2*H+vsize
    ins={'x':f(B,S,H),'w':f(H,wh,scale=.2)}
    names=['x','w']
    def opt(k,v):
        if v is None: names.append('')
        else: names.append(k); ins[k]=v
    opt('b',f(wh,scale=.2) if bias_ else None); opt('m',mask); opt('p',past); opt('ab',ab)
    while names[-1]=='': names.pop()
    if vsize: kw['qkv_hidden_sizes']=[H,H,vsize]
    c={k:ins.pop(k) for k in ('w','b') if k in ins}
    case('att_'+name,ms('Attention',names,list(outs),num_heads=N,**kw),ins,list(outs),consts=c)
att('plain'); att('nobias',bias_=False); att('causal',unidirectional=1)
att('mask1',i32(3,5)); att('mask2b',i32(3,5,1,0)); att('mask2',np.array([[1,1,1,0,0],[1,1,1,1,1]],np.int32))
att('mask3',(rng.random((B,S,S))>.3).astype(np.int32)); att('mask3c',(rng.random((B,S,S))>.3).astype(np.int32),unidirectional=1)
att('maskc',np.array([[1,1,1,0,0],[0,1,1,1,1]],np.int32),unidirectional=1)
att('mask0',np.array([[0,0,0,0,0],[0,1,1,1,1]],np.int32),mask_filter_value=-1e9)
att('past',past=f(2,B,N,3,D),outs=('y','pr'),unidirectional=1)
att('pastmask',mask=(rng.random((B,S+3))>.3).astype(np.int32),past=f(2,B,N,3,D),outs=('y','pr'))
att('bias',ab=f(B,N,S,S)); att('bias1',ab=f(1,N,S,S),mask=i32(3,5)); att('biasb',ab=f(1,1,S,S))
att('vsize',vsize=6); att('scale',scale=0.3)
# MHA
def mha(name,q=None,k=None,v=None,bias=None,mask=None,ab=None,pk=None,pv=None,outs=('y',),**kw):
    ins={};names=[]
    for n_,x in zip(['q','k','v','b','m','ab','pk','pv'],[q,k,v,bias,mask,ab,pk,pv]):
        if x is None: names.append('')
        else: names.append(n_); ins[n_]=x
    while names[-1]=='': names.pop()
    case('mha_'+name,ms('MultiHeadAttention',names,list(outs),num_heads=N,**kw),ins,list(outs))
L=6
mha('self',f(B,S,H),f(B,S,H),f(B,S,H)); mha('cross',f(B,S,H),f(B,L,H),f(B,L,H)); mha('vsz',f(B,S,H),f(B,L,H),f(B,L,6))
mha('bias',f(B,S,H),f(B,S,H),f(B,S,H),f(3*H)); mha('packed',f(B,S,N,3,D)); mha('packedkv',f(B,S,H),f(B,L,N,2,D))
mha('causal',f(B,S,H),f(B,S,H),f(B,S,H),unidirectional=1); mha('mask1',f(B,S,H),f(B,L,H),f(B,L,H),mask=i32(4,6))
mha('mask2',f(B,S,H),f(B,L,H),f(B,L,H),mask=(rng.random((B,L))>.3).astype(np.int32))
mha('mask3',f(B,S,H),f(B,L,H),f(B,L,H),mask=(rng.random((B,S,L))>.3).astype(np.int32))
mha('ab',f(B,S,H),f(B,L,H),f(B,L,H),ab=f(B,N,S,L)); mha('abmask',f(B,S,H),f(B,L,H),f(B,L,H),ab=f(1,1,S,L),mask=i32(4,6))
mha('past',f(B,S,H),f(B,S,H),f(B,S,H),pk=f(B,N,3,D),pv=f(B,N,3,D),outs=('y','a','b2'))
mha('pastc',f(B,S,H),f(B,S,H),f(B,S,H),pk=f(B,N,3,D),pv=f(B,N,3,D),outs=('y','a','b2'),unidirectional=1)
mha('past1',f(B,1,H),f(B,1,H),f(B,1,H),f(3*H),mask=(rng.random((B,4))>.3).astype(np.int32),pk=f(B,N,3,D),pv=f(B,N,3,D),outs=('y','a','b2'))
mha('kv4',f(B,S,H),f(B,N,L,D),f(B,N,L,D)); mha('kv4b',f(B,S,H),f(B,N,L,D),f(B,N,L,D),bias=f(3*H)); mha('scale',f(B,S,H),f(B,S,H),f(B,S,H),scale=0.25)
# GQA: ONNX Runtime turns heads of 16 elements and more.
D=16; H=N*D
def gqa(name,B=2,S=5,P=0,T=None,K=1,lens=None,packed=False,rot=False,pos=None,ab=None,sink=None,cap=None,norm=False,outs=('y','pk2','pv2'),consts_lens=False,**kw):
    T=T or P+S
    ins={};names=[]
    def put(n_,x):
        if x is None: names.append('')
        else: names.append(n_); ins[n_]=x
    if packed: put('q',f(B,S,(N+2*K)*D)); put('k',None); put('v',None)
    else: put('q',f(B,S,H)); put('k',f(B,S,K*D)); put('v',f(B,S,K*D))
    C=cap or P
    if C: put('pk',f(B,K,C,D)); put('pv',f(B,K,C,D))
    else: put('pk',None); put('pv',None)
    put('sl',np.array(lens if lens is not None else [T-1]*B,np.int32)); put('tot',np.array(T,np.int32))
    rd = rot if rot is True else rot
    if rot:
        n=D//2 if rot is True else rot//2
        put('cos',np.cos(f(64,n))); put('sin',np.sin(f(64,n)))
        kw['do_rotary']=1
    else: put('cos',None); put('sin',None)
    put('pos',pos); put('ab',ab); put('sink',sink)
    put('ks',None); put('vs',None)
    if norm: put('qn',f(D)); put('kn',f(D))
    while names[-1]=='': names.pop()
    c={'tot':ins.pop('tot')}
    if 'cos' in ins: c['cos']=ins.pop('cos'); c['sin']=ins.pop('sin')
    case('gqa_'+name,ms('GroupQueryAttention',names,list(outs),num_heads=N,kv_num_heads=K,**kw),ins,list(outs),consts=c)
gqa('prompt'); gqa('packed',packed=True); gqa('rot',rot=True); gqa('rotint',rot=True,rotary_interleaved=1); gqa('packrot',packed=True,rot=True)
gqa('decode',S=1,P=4); gqa('decoderot',S=1,P=4,rot=True); gqa('b1decode',B=1,S=1,P=4,rot=True,lens=[4])
gqa('lens',S=1,P=6,lens=[6,3],rot=True,cap=10,T=7); gqa('share1',B=1,S=1,P=6,T=7,cap=10,lens=[6]); gqa('chunk',B=1,S=3,P=4,rot=True); gqa('chunkshare',B=1,S=3,T=7,cap=10,lens=[6])
gqa('promptshare',B=2,S=5,T=5,cap=9)
gqa('window',S=6,local_window_size=2); gqa('windowdec',S=1,P=7,local_window_size=3); gqa('windowbig',S=4,local_window_size=10)
gqa('softcap',softcap=2.0); gqa('scale',scale=.4); gqa('smooth',smooth_softmax=1); gqa('sink',sink=f(N)); gqa('ab',ab=f(2,N,5,5)); gqa('ab1',ab=f(1,1,5,5))
gqa('pos',B=2,S=5,rot=True,pos=np.tile(np.arange(5),(2,1)).astype(np.int64)); gqa('norm',norm=True,rot=True); gqa('noncausal',causal=0)
gqa('posdec',B=2,S=1,P=4,rot=True,pos=np.array([[4],[4]],np.int64))
D=4; H=N*D
# rotary
def rot(name,x,pos,n,**kw):
    case('rot_'+name,ms('RotaryEmbedding',['x','p','c','s'],['y'],**kw),{'x':x,'p':pos},['y'],consts={'c':np.cos(f(32,n)),'s':np.sin(f(32,n))})
pos2=np.array([[0,1,2,3,4],[4,5,6,7,8]],np.int64)
rot('3d',f(B,S,H),pos2,2); rot('3di',f(B,S,H),pos2,2,interleaved=1); rot('4d',f(B,N,S,D),pos2,2); rot('off',f(B,S,H),np.array([3],np.int64),2)
rot('part',f(B,S,H),pos2,1,num_heads=N,rotary_embedding_dim=2); rot('scale',f(B,S,H),pos2,2,scale=2.0)
# Norms
def emb(name,seg=True,mask=None,pos=None,outs=('y','m')):
    ins={'ids':rng.integers(0,20,(B,S)).astype(np.int32)};names=['ids']
    c={'w':f(20,H),'p':f(9,H),'g':f(H),'b':f(H)}
    if seg: ins['seg']=rng.integers(0,2,(B,S)).astype(np.int32); c['s']=f(2,H); names+=['seg','w','p','s','g','b']
    else: names+=['','w','p','','g','b']
    if mask is not None: ins['mask']=mask; names.append('mask')
    elif pos is not None: names.append('')
    if pos is not None: ins['pos']=pos; names.append('pos')
    case('emb_'+name,ms('EmbedLayerNormalization',names,list(outs),epsilon=1e-5),ins,list(outs),consts=c)
emb('plain'); emb('noseg',seg=False); emb('mask',mask=np.array([[1,1,1,0,0],[1,1,1,1,1]],np.int32)); emb('sum',outs=('y','m','s2')); emb('pos',pos=np.array([[3,2,1,0,4]]*2,np.int32))
for op,n in (('SkipLayerNormalization',5),('SkipSimplifiedLayerNormalization',4)):
    names=['x','s','g','b','c'][:n] if n==5 else ['x','s','g','c']
    ins={'x':f(B,S,H),'s':f(B,S,H)}; c={'g':f(H),'b':f(H),'c':f(H)}; c={k:c[k] for k in names if k in c}
    case(op+'_full',ms(op,names,['y','','','t']),ins,['y','t'],consts=c)
    case(op+'_min',ms(op,names[:3],['y']),ins,['y'],consts={'g':c['g']})
    case(op+'_bc',ms(op,names[:3],['y']),{'x':f(B,S,H),'s':f(S,H)},['y'],consts={'g':c['g']})
case('gelu',ms('Gelu',['x'],['y']),{'x':f(3,7)},['y']); case('fastgelu',ms('FastGelu',['x','b'],['y']),{'x':f(3,7),'b':f(7)},['y']); case('quick',ms('QuickGelu',['x'],['y'],alpha=1.5),{'x':f(3,7)},['y'])
case('biasgelu',ms('BiasGelu',['x','b'],['y']),{'x':f(3,7),'b':f(7)},['y'])
case('biassplit',ms('BiasSplitGelu',['x','b'],['y']),{'x':f(2,3,8),'b':f(8)},['y']); case('biasadd',ms('BiasAdd',['x','b','s'],['y']),{'x':f(2,3,8),'b':f(8),'s':f(2,3,8)},['y'])
case('biasdrop',ms('BiasDropout',['x','b','s'],['y','m']),{'x':f(2,3,8),'b':f(8),'s':f(2,3,8)},['y'])
case('biassm',ms('BiasSoftmax',['x','b'],['y'],axis=3,is_inner_broadcast=1),{'x':f(2,3,4,8),'b':f(2,1,1,8)},['y'])
case('gn',ms('GroupNorm',['x','g','b'],['y'],groups=2,activation=1),{'x':f(2,3,4,8),'g':f(8),'b':f(8)},['y'])
case('sgn',ms('SkipGroupNorm',['x','g','b','s','c'],['y','t'],groups=2,activation=0),{'x':f(2,3,4,8),'g':f(8),'b':f(8),'s':f(2,8),'c':f(8)},['y','t'])
# Fused
for act,kw in (('Relu',{}),('Tanh',{}),('LeakyRelu',{'activation_alpha':.2}),('HardSigmoid',{'activation_alpha':.3,'activation_beta':.4}),('Sigmoid',{})):
    case('fgemm_'+act,ms('FusedGemm',['a','b','c'],['y'],activation=act,transB=1,alpha=.5,**kw),{'a':f(3,4)},['y'],consts={'b':f(5,4),'c':f(5)})
for ta in (0,1):
  for tb in (0,1):
    for ba in (0,1):
      a=f(2,3,4,4) if ba else f(2,3,4,4)
      b_=f(2,3,4,4)
      case(f'fmm_{ta}{tb}{ba}',ms('FusedMatMul',['a','b'],['y'],transA=ta,transB=tb,alpha=.5),{'a':a,'b':b_},['y'])
case('fmm_batchA',ms('FusedMatMul',['a','b'],['y'],transBatchA=1),{'a':f(4,2,3,5),'b':f(2,3,5,6)},['y'])
case('fmm_batchB',ms('FusedMatMul',['a','b'],['y'],transBatchB=1,transBatchA=1,transA=1),{'a':f(4,2,3,5),'b':f(4,2,3,6)},['y'])
case('fmm_vec',ms('FusedMatMul',['a','b'],['y'],alpha=.5),{'a':f(4),'b':f(4,3)},['y'])
case('fmmact',ms('FusedMatMulActivation',['a','b'],['y'],activation='Relu',alpha=.5,transB=1),{'a':f(2,3,4),'b':f(2,5,4)},['y'])
case('tmm',ms('TransposeMatMul',['a','b'],['y'],transA=1),{'a':f(4,3),'b':f(4,5)},['y'])
case('gemmfg',ms('GemmFastGelu',['a','b','c'],['y']),{'a':f(2,3,4),'b':f(4,5),'c':f(5)},['y'])
case('nhwc',ms('NhwcFusedConv',['x','w','b'],['y'],activation='Relu',pads=[1,1,1,1]),{'x':f(1,6,6,4)},['y'],consts={'w':f(8,4,3,3),'b':f(8)})
case('fconv',ms('FusedConv',['x','w','b','z'],['y'],activation='Relu',pads=[1,1,1,1]),{'x':f(1,4,6,6),'z':f(1,8,6,6)},['y'],consts={'w':f(8,4,3,3),'b':f(8)})
# misc
case('inverse',ms('Inverse',['x'],['y']),{'x':f(3,4,4)},['y']); case('trilu',ms('Trilu',['x'],['y'],upper=0),{'x':f(3,4,4)},['y']); case('expand',ms('ExpandDims',['x','a'],['y']),{'x':f(3,4)},['y'],consts={'a':np.array(-1,np.int32)})
case('unfold',ms('UnfoldTensor',['x'],['y'],dim=1,size=3,step=2),{'x':f(2,8,3)},['y']); case('unfoldl',ms('UnfoldTensor',['x'],['y'],dim=-1,size=2),{'x':f(2,8,3)},['y'])
case('cdist',ms('CDist',['a','b'],['y'],metric='euclidean'),{'a':f(4,3),'b':f(5,3)},['y']); case('cdist2',ms('CDist',['a','b'],['y']),{'a':f(4,3),'b':f(5,3)},['y'])
for mode in ('bilinear','nearest'):
  for cs in ((3,4),(1,1),(5,5)):
    case(f'crop_{mode}{cs[0]}',ms('CropAndResize',['x','r','b','c'],['y'],mode=mode,extrapolation_value=7.),{'x':f(2,3,6,7),'r':np.array([[0,0,1,1],[.1,.2,.7,.9],[-.2,.3,1.2,.5]],np.float32),'b':i32(0,1,1)},['y'],consts={'c':i32(*cs)})
case('dtw',ms('DynamicTimeWarping',['x'],['y']),{'x':f(5,7)},['y']); case('dtw3',ms('DynamicTimeWarping',['x'],['y']),{'x':f(1,9,6)},['y'])
case('unique',ms('Unique',['x'],['y','i','c']),{'x':np.array([3,1,3,2,1,9],np.float32)},['y','i','c'])
case('ctdp',ms('ConvTransposeWithDynamicPads',['x','w','p'],['y'],strides=[2,2]),{'x':f(1,3,5,5)},['y'],consts={'w':f(3,2,3,3),'p':i64(1,0,1,1)})
case('mspad',ms('Pad',['x','p'],['y'],mode='reflect'),{'x':f(3,4)},['y'],consts={'p':i64(1,0,1,2)})
for m_ in ('bilinear','nearest','bicubic'): case('gs_'+m_,ms('GridSample',['x','g'],['y'],mode=m_),{'x':f(1,2,4,5),'g':f(1,3,3,2)},['y'])
case('rfft',ms('Rfft',['x'],['y'],signal_ndim=1),{'x':f(2,8)},['y']); case('irfft',ms('Irfft',['x'],['y'],signal_ndim=1),{'x':f(2,5,2)},['y'])
case('rpb',ms('RelativePositionBias',['t','q','k'],['y'],max_distance=16,is_bidirectional=1),{'t':f(8,4)},['y'],consts={'q':np.array(6,np.int64),'k':np.array(6,np.int64)})
case('simpl',node('SimplifiedLayerNormalization',['x','g'],['y'],epsilon=1e-5),{'x':f(2,3,8)},['y'],consts={'g':f(8)})
report()
